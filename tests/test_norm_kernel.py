"""The kernel of modulate, gated_add and gated_modulate on the CPU: seeded shapes, layouts, what it refuses."""

import mmap
import random

import pytest
import torch
from numerics import assert_no_worse_than
from test_norm import ARGUMENTS, DTYPES, EPS, assert_op, call, make, plain, reference, shape_id

from echo_ext import _native
from echo_ext.norm import gated_modulate, modulate


def seeded_shapes(count):
    """(B, F, T_f, D): widths of one vector and past what a thread takes, odd numbers of tokens."""
    draw = random.Random(3)
    shapes = [(1, 1, 1, 8), (1, 1, 2, 512), (1, 1, 2, 520), (1, 1, 1, 1536), (1, 1, 1, 5120)]
    while len(shapes) < count:
        shapes.append((draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 5), 8 * draw.randint(1, 80)))
    return shapes


SHAPES = seeded_shapes(40)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: shape_id(SHAPES[i]))
def test_kernel_matches_the_formula_in_float64(index, dtype, emulated):
    case = list(ARGUMENTS)[index % len(ARGUMENTS)]
    assert_op(case, make(SHAPES[index], dtype, strided=index % 2, rows=None if index % 3 else 1), backend="kernel")
    assert emulated.counters().launches == 1


@pytest.mark.sanitizers
@pytest.mark.parametrize("case", ARGUMENTS)
def test_every_op_under_the_sanitizers(case, emulated):
    assert_op(case, make((2, 3, 2, 264), torch.bfloat16, strided=True), backend="kernel")


@pytest.mark.parametrize("case", ["modulate", "add, then norm"])
def test_constant_and_huge_tokens_stay_finite(case, emulated):
    t = make((1, 1, 3, 528))
    t["x"][:, 0], t["x"][:, 1], t["y"][:, :2] = 3.0, 1e15 * t["x"][:, 1], 0.0
    for out, budget, exact in zip(call(case, t, backend="kernel"), reference(case, t), plain(case, t), strict=True):
        for i in range(3):
            assert_no_worse_than(out[:, i], budget[:, i], exact[:, i])


def test_mean_far_from_zero_costs_no_digits(emulated):
    t = make((1, 1, 2, 1536))
    t["x"] += 1000.0
    assert_op("modulate", t, backend="kernel")


def test_an_infinite_token_stays_alone(emulated):
    t = make((1, 1, 3, 48))
    clean = call("modulate", t, backend="kernel")[0]
    t["x"][:, 1, 5] = float("inf")
    out = call("modulate", t, backend="kernel")[0]
    assert out[:, 1].isnan().any()
    assert torch.equal(out[:, ::2], clean[:, ::2])


def test_no_tokens_no_streams_and_expanded_vectors(emulated):
    t = make((2, 3, 2, 16))
    assert modulate(t["x"][:0], t["shift"][:1], t["scale"][:1], EPS, backend="kernel").shape == (0, 6, 16)
    assert modulate(t["x"][:, :0], t["shift"], t["scale"], EPS, backend="kernel").shape == (2, 0, 16)
    t["scale"] = torch.randn(16).expand(2, 3, 1, 16)
    t["x"] = torch.randn(6, 16).expand(2, 6, 16)
    assert_op("modulate", t, backend="kernel")


def test_tokens_beyond_32_bit_offsets(emulated):
    """A row of batch elements 2^31 elements apart in one buffer, of which only the touched pages exist."""
    buffer = torch.frombuffer(_reserve(2 * (2**31 + 64)), dtype=torch.bfloat16)
    x = buffer.as_strided((2, 1, 32), (2**31, 32, 1))
    x.normal_()
    t = make((2, 1, 1, 32), torch.bfloat16) | {"x": x}
    assert_op("gated_modulate", t, backend="kernel")


def _reserve(nbytes):
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_gradient_through_the_kernel_is_the_references(case, emulated):
    grads = []
    for backend in ("kernel", "reference"):
        torch.manual_seed(1)
        t = make((2, 2, 2, 16), requires_grad=True)
        inputs = [t[name] for name in ("x", *ARGUMENTS[case]) if name]
        outs = call(case, t, backend=backend)
        grads.append(torch.autograd.grad([out.square().sum() for out in outs], inputs))
    for x, y in zip(*grads, strict=True):
        assert_no_worse_than(x, y, y.double())


def test_kernel_op_registration(emulated):
    t = make((2, 3, 2, 16), torch.bfloat16, strided=True)
    torch.library.opcheck(torch.ops.echo_ext.modulate.default, (t["x"], t["shift"], t["scale"], EPS))
    torch.library.opcheck(torch.ops.echo_ext.gated_add.default, (t["x"], t["y"], t["gate"]))
    args = (t["x"], t["y"], None, t["bias"], t["weight"], EPS)
    torch.library.opcheck(torch.ops.echo_ext.gated_modulate.default, args)
    assert emulated.counters().launches > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(1, 4, 16, dtype=torch.float64)}, "dtype torch.float64 is not built"),
        ({"y": torch.zeros(1, 4, 16).half()}, "y is torch.float16, x is torch.float32"),
        ({"shift": torch.zeros(1, 2, 1, 16).bfloat16()}, "shift is torch.bfloat16, x is torch.float32"),
        ({"x": torch.zeros(1, 4, 32)[..., ::2]}, "the last dim of x is strided"),
        ({"y": torch.zeros(1, 4, 18)[..., :16]}, "rows of y don't start at multiples of 16 bytes"),
        ({"gate": torch.zeros(33)[1:].view(1, 2, 1, 16)}, "rows of gate don't start at multiples of 16 bytes"),
    ],
)
def test_what_the_kernel_cannot_take_is_left_to_pytorch(change, reason, emulated):
    t = make((1, 2, 2, 16))
    args = [(t | change)[name] for name in ("x", "y", "gate", "shift", "scale")]
    with pytest.raises(RuntimeError, match=f"gated_modulate: kernel can't run: {reason}"):
        gated_modulate(*args, backend="kernel")
    gated_modulate(*args)
    assert emulated.counters().launches == 0


@pytest.mark.parametrize(("width", "reason"), [(12, "is 12, no multiple of 8"), (12296, "wider than 24576 bytes")])
def test_widths_the_kernel_cannot_take(width, reason, emulated):
    t = make((1, 1, 1, width), torch.bfloat16)
    with pytest.raises(RuntimeError, match=reason):
        call("modulate", t, backend="kernel")
    assert_op("modulate", t)


ZEROS = {
    **{name: torch.zeros(2, 6, 16) for name in ("x", "y", "sum", "out")},
    **{name: torch.zeros(2, 3, 1, 16) for name in ("gate", "shift", "scale")},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 16)}, r"x must be \(-1, -1, -1\), -1 for any size, got \(6, 16\)"),
        ({"x": torch.zeros(2, 6, 32)[..., ::2]}, "x must have a contiguous last dim"),
        (
            {"x": torch.zeros(2 * 6 * 16 + 1)[1:].view(2, 6, 16)},
            "x must have rows that fill and start at multiples of 16",
        ),
        ({"x": torch.zeros(2, 6, 18)[..., :16]}, "x must have rows that fill and start at multiples of 16"),
        ({"y": torch.zeros(2, 5, 16)}, r"y must be \(2, 6, 16\)"),
        ({"y": torch.zeros(2, 6, 16).half()}, "y must be float32, got float16"),
        ({"sum": torch.zeros(2, 6, 32)[..., :16]}, "sum must be contiguous"),
        ({"out": torch.zeros(6, 2, 16).transpose(0, 1)}, "out must be contiguous"),
        ({"sum": None}, "y, gate and sum go together"),
        ({"y": None, "sum": None}, "y, gate and sum go together"),
        ({"scale": None}, "shift, scale and out go together"),
        ({"gate": torch.zeros(16)}, r"gate must be \(-1, -1, 1, 16\)"),
        ({"gate": torch.zeros(3, 3, 1, 16)}, "gate has 3 rows for a batch of 2"),
        ({"shift": torch.zeros(2, 2, 1, 16)}, "shift has 2 frames, not 3"),
        ({"gate": torch.zeros(2, 4, 1, 16)}, "gate has 4 frames for 6 tokens"),
        ({"scale": torch.zeros(20)}, r"scale must be \(16,\)"),
        ({"scale": torch.zeros(2, 3, 1, 16).bfloat16()}, "scale must be float32, got bfloat16"),
    ],
)
def test_binding_rejects_what_python_missed(change, message, emulated):
    views = {name: None if x is None else _native.view(x) for name, x in (ZEROS | change).items()}
    with pytest.raises(ValueError, match=f"echo_ext: {message}"):
        _native.module().gated_modulate_fwd(**views, eps=EPS, stream=(0, 0))
    assert emulated.counters().launches == 0
