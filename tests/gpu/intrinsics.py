"""What each intrinsic does, in numpy: inputs and expected words of the kernels in conformance*.cu."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
Words = np.ndarray  # uint32


class Case(NamedTuple):
    """The words a kernel reads, the words it should leave, and how to compare them."""

    words: Words
    expected: Words
    kind: str  # "bits", or "float" for sums whose order or rounding the hardware chooses
    found: Words | None = None  # what the kernel finds in its output; zeros


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to nearest, ties to even; every NaN is 0x7fff."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def bf16_value(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f16_bits(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        bits = np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint16)


def f16_value(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


TO_BITS = {"bf16": bf16_bits, "f16": f16_bits}
TO_VALUE = {"bf16": bf16_value, "f16": f16_value}


def tf32_bits(x: np.ndarray) -> np.ndarray:
    """Nearest of 10 fraction bits, ties away from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits.astype(np.uint64) + 0x1000) & 0xFFFFE000, bits).astype(np.uint32)


def some_floats(rng: np.random.Generator, count: int) -> np.ndarray:
    """Of every size, with ties of every rounding, subnormals of both 16-bit types, zeros and infinities."""
    sizes = 2.0 ** rng.integers(-30, 20, count)
    x = (rng.standard_normal(count) * sizes).astype(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0]
    special += [2.0**-24, 2.0**-25, 3 * 2.0**-25, -(2.0**-14), 1 + 2**-11 + 2**-23, 2.0**-130, 3.0e38, np.nan]
    x[: len(special)] = special
    return x


def halves(words: Words) -> np.ndarray:
    return words.view(np.uint16)


def words_of(x: np.ndarray) -> Words:
    return np.ascontiguousarray(x).view(np.uint32).reshape(-1)


CASES: dict[str, Callable[[np.random.Generator], Case]] = {}


def case(name: str) -> Callable[[Callable], Callable]:
    def add(build: Callable) -> Callable:
        CASES[name] = build
        return build

    return add


def random_words(rng: np.random.Generator, count: int) -> Words:
    return rng.integers(0, 2**32, count, dtype=np.uint32)


LANE = np.arange(32)


def moved(source: Callable[[np.ndarray], np.ndarray], count: int) -> Callable[[np.random.Generator], Case]:
    """A case whose output is a rearrangement of its input."""

    def build(rng: np.random.Generator) -> Case:
        words = random_words(rng, count)
        return Case(words, words_of(source(words)), "bits")

    return build


CASES["vector16"] = moved(lambda w: w.reshape(32, 4)[::-1], 128)
CASES["syncwarp"] = moved(lambda w: w[::-1], 32)
CASES["named_barriers"] = moved(lambda w: w.reshape(4, 64)[:, ::-1], 256)
CASES["mbarriers"] = CASES["named_barriers"]
CASES["registers"] = moved(lambda w: w, 256)
CASES["elect_one"] = moved(lambda w: np.array([1, 1], np.uint32), 1)


def matrices(rows: np.ndarray) -> np.ndarray:
    """(matrix, row, column) as ldmatrix reads them: lane l names row 5 l mod 32."""
    return halves(rows).reshape(32, 8)[LANE * 5 % 32].reshape(4, 8, 8)


def fragments(m: np.ndarray) -> np.ndarray:
    """(lane, matrix, 2): row l / 4, columns 2 (l mod 4) and the next."""
    return m[:, LANE // 4].reshape(4, 32, 4, 2)[:, LANE, LANE % 4].transpose(1, 0, 2)


CASES["ldmatrix_x4"] = moved(lambda w: fragments(matrices(w)), 128)
CASES["ldmatrix_x4_trans"] = moved(lambda w: fragments(matrices(w).transpose(0, 2, 1)), 128)


def stored(words: Words, trans: bool) -> np.ndarray:
    m = np.zeros((4, 8, 8), np.uint16)
    pairs = halves(words).reshape(32, 4, 2)
    for lane in range(32):
        for q in range(4):
            for half in range(2):
                i, j = lane // 4, lane % 4 * 2 + half
                m[(q, j, i) if trans else (q, i, j)] = pairs[lane, q, half]
    rows = np.zeros((32, 8), np.uint16)
    rows[LANE * 5 % 32] = m.reshape(32, 8)
    return rows


CASES["stmatrix_x4"] = moved(lambda w: stored(w, False), 128)
CASES["stmatrix_x4_trans"] = moved(lambda w: stored(w, True), 128)
CASES["shuffles"] = moved(
    lambda w: np.concatenate(
        [
            w[LANE * 7 % 32],
            w[np.where(LANE >= 3, LANE - 3, LANE)],
            w[np.where(LANE + 5 < 32, LANE + 5, LANE)],
            w[LANE ^ 9],
            w[LANE // 8 * 8 + LANE * 3 % 8],
            w[np.where(LANE % 4 >= 1, LANE - 1, LANE)],
            w[np.where(LANE % 16 + 2 < 16, LANE + 2, LANE)],
        ]
    ),
    32,
)
CASES["ballot"] = moved(
    lambda w: np.full(32, np.sum((w & 1).astype(np.uint64) << LANE.astype(np.uint64)), np.uint32), 32
)
CASES["atomic_add"] = moved(lambda w: w.reshape(16, 8).sum(axis=0, dtype=np.uint32), 128)
CASES["cp_async16"] = moved(
    lambda w: np.concatenate(
        [w[:128].reshape(32, 4) * (LANE % 3 != 0)[:, None].astype(np.uint32), w[128:].reshape(32, 4)[::-1]]
    ),
    256,
)


def mma_case(kind: str, depth: int) -> Callable[[np.random.Generator], Case]:
    def build(rng: np.random.Generator) -> Case:
        a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((16, depth), (depth, 8), (16, 8)))
        row, quad = LANE // 4, LANE % 4
        if kind == "tf32":  # the lower bits are noise that the tensor core ignores
            a_words = np.stack([a[row + i % 2 * 8, quad + i // 2 * 4] for i in range(4)], 1).view(np.uint32)
            b_words = np.stack([b[quad + i * 4, row] for i in range(2)], 1).view(np.uint32)
            a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
        else:
            a, b = (TO_BITS[kind](x) for x in (a, b))
            pairs = [np.stack([a[row + i % 2 * 8, 2 * quad + i // 2 * 8 + h] for h in range(2)], 1) for i in range(4)]
            a_words = np.stack(pairs, 1).view(np.uint32).reshape(32, 4)
            pairs = [np.stack([b[2 * quad + i * 8 + h, row] for h in range(2)], 1) for i in range(2)]
            b_words = np.stack(pairs, 1).view(np.uint32).reshape(32, 2)
            a, b = (TO_VALUE[kind](x) for x in (a, b))
        at = [(row + i // 2 * 8, 2 * quad + i % 2) for i in range(4)]
        c_words = np.stack([c[i] for i in at], 1).view(np.uint32)
        d = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
        expected = np.stack([d[i] for i in at], 1)
        return Case(words_of(np.concatenate([a_words, b_words, c_words], 1)), words_of(expected), "float")

    return build


CASES["mma_bf16_16816"] = mma_case("bf16", 16)
CASES["mma_f16_16816"] = mma_case("f16", 16)
CASES["mma_tf32_1688"] = mma_case("tf32", 8)


def of_floats(
    convert: Callable[[np.ndarray], np.ndarray], *, nans: bool = True
) -> Callable[[np.random.Generator], Case]:
    def build(rng: np.random.Generator) -> Case:
        x = some_floats(rng, 128)
        if not nans:  # what becomes of one is not documented
            x = np.where(np.isnan(x), np.float32(1), x)
        return Case(words_of(x), words_of(convert(x)), "bits")

    return build


CASES["round_tf32"] = of_floats(tf32_bits, nans=False)
CASES["bf16_bits"] = of_floats(lambda x: bf16_bits(x).astype(np.uint32))
CASES["f16_bits"] = of_floats(lambda x: f16_bits(x).astype(np.uint32))
CASES["pack_bf16"] = of_floats(bf16_bits)
CASES["pack_f16"] = of_floats(f16_bits)


@case("ex2")
def _ex2(rng: np.random.Generator) -> Case:
    x = (rng.standard_normal(128) * 20).astype(np.float32)
    return Case(words_of(x), words_of(np.exp2(x.astype(np.float64)).astype(np.float32)), "float")


def values_case(kind: str) -> Callable[[np.random.Generator], Case]:
    def build(rng: np.random.Generator) -> Case:
        words = np.concatenate([rng.integers(0, 2**16, 120), [0, 0x8000, 1, 0x3FF, 0x7C00, 0x7F80, 0x8001, 0x400]])
        values = TO_VALUE[kind](words.astype(np.uint16))
        words = np.where(np.isnan(values), 0, words).astype(np.uint32)  # which NaN a NaN becomes is nobody's business
        return Case(words, words_of(TO_VALUE[kind](words.astype(np.uint16))), "bits")

    return build


CASES["bf16_value"] = values_case("bf16")
CASES["f16_value"] = values_case("f16")


def floats_case(kind: str) -> Callable[[np.random.Generator], Case]:
    def build(rng: np.random.Generator) -> Case:
        x = rng.standard_normal((32, 8)).astype(np.float32)
        narrow = TO_BITS.get(kind, lambda v: v)
        wide = TO_VALUE.get(kind, lambda v: v)
        x = wide(narrow(x))
        out = 2 * x
        out[:, 1] += x[:, 1]
        out[:, 5:] = x[:, 1:4]
        return Case(words_of(narrow(x)), words_of(narrow(out)), "bits")

    return build


CASES["floats_f32"] = floats_case("f32")
CASES["floats_f16"] = floats_case("f16")
CASES["floats_bf16"] = floats_case("bf16")


def box_of(shape: tuple[int, ...], at: tuple[int, ...], box: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each element of a box, outermost axis first: its index in the tensor, and whether it lies there."""
    axes = np.meshgrid(*(start + np.arange(n) for start, n in zip(at, box, strict=True)), indexing="ij")
    inside = np.all([(x >= 0) & (x < n) for x, n in zip(axes, shape, strict=True)], axis=0)
    index = np.ravel_multi_index([np.clip(x, 0, n - 1) for x, n in zip(axes, shape, strict=True)], shape)
    return index, inside


def swizzled(count: int, item: int, swizzle: int) -> np.ndarray:
    """Where each element of dense lines lies: 16-byte columns exchanged by the line's number, as TMA does."""
    offset = np.arange(count) * item
    lines = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return (offset ^ ((offset >> 7 & lines) << 4)) // item


class Tma(NamedTuple):
    item: int  # bytes
    shape: tuple[int, ...]  # outermost axis first, as every tuple here
    at: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


LOADS = {
    "tma_load_2d_128": Tma(2, (10, 80), (3, 24), (16, 64), 128),
    "tma_load_2d_64": Tma(2, (10, 80), (-2, -8), (16, 32), 64),
    "tma_load_2d_32": Tma(2, (10, 80), (1, 5), (8, 16), 32),
    "tma_load_2d_0": Tma(4, (10, 40), (2, 33), (8, 16), 0),
    "tma_load_3d": Tma(2, (3, 6, 80), (1, 4, 8), (2, 8, 64), 128),
    "tma_load_4d": Tma(2, (2, 2, 6, 80), (1, 1, -1, 60), (2, 4, 4, 32), 64),
    "tma_load_5d": Tma(4, (2, 2, 2, 3, 20), (-1, 1, 0, 1, 3), (2, 2, 4, 4, 8), 32),
}
STORES = {
    "tma_store_2d": Tma(2, (10, 80), (-3, 24), (16, 64), 128),
    "tma_store_3d": Tma(4, (3, 6, 20), (1, 1, 12), (2, 8, 16), 0),
    "tma_store_4d": Tma(2, (2, 2, 6, 80), (1, 1, 4, 60), (2, 4, 4, 32), 64),
}


def load_case(tma: Tma) -> Callable[[np.random.Generator], Case]:
    def build(rng: np.random.Generator) -> Case:
        words = random_words(rng, int(np.prod(tma.shape)) * tma.item // 4)
        index, inside = box_of(tma.shape, tma.at, tma.box)
        tensor = words.view(np.uint16 if tma.item == 2 else np.uint32)
        out = np.empty(index.size, tensor.dtype)
        out[swizzled(index.size, tma.item, tma.swizzle)] = np.where(inside, tensor[index], 0).reshape(-1)
        return Case(words, words_of(out), "bits")

    return build


def store_case(tma: Tma) -> Callable[[np.random.Generator], Case]:
    def build(rng: np.random.Generator) -> Case:
        index, inside = box_of(tma.shape, tma.at, tma.box)
        words = random_words(rng, index.size * tma.item // 4)
        found = random_words(rng, int(np.prod(tma.shape)) * tma.item // 4)
        kind = np.uint16 if tma.item == 2 else np.uint32
        out = found.copy().view(kind)
        box = words.view(kind)[swizzled(index.size, tma.item, tma.swizzle)].reshape(index.shape)
        out[index[inside]] = box[inside]
        return Case(words, words_of(out), "bits", found)

    return build


CASES.update({name: load_case(tma) for name, tma in LOADS.items()})
CASES.update({name: store_case(tma) for name, tma in STORES.items()})


def wgmma_case(kind: str, n: int) -> Callable[[np.random.Generator], Case]:
    def build(rng: np.random.Generator) -> Case:
        a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((64, 16), (16, n), (64, n)))
        a, b = (TO_BITS[kind](x) for x in (a, b))
        d = TO_VALUE[kind](a).astype(np.float64) @ TO_VALUE[kind](b).astype(np.float64) + c
        return Case(np.concatenate([words_of(a), words_of(b), words_of(c)]), words_of(d.astype(np.float32)), "float")

    return build


for _name in re.findall(r"WGMMA\((wgmma_\w+)", (HERE / "conformance_sm90.cu").read_text()):
    _kind, _n = re.findall(r"_(bf16|f16)_(\d+)_", _name)[0]
    CASES[_name] = wgmma_case(_kind, int(_n))


def make(name: str) -> Case:
    """The same case on every machine."""
    return CASES[name](np.random.default_rng(zlib.crc32(name.encode())))
