"""The CPU kernels of gated residual and norm: every instruction set against float64."""

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, needs_kernels
from numerics import assert_no_worse_than, assert_same_bits

from echo_ext import _cpu, _native

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# (B, F, T_f, D): one token; two streams; a wide token; more tokens than one task takes.
SHAPES = [(1, 1, 1, 16), (2, 3, 5, 48), (1, 2, 3, 8192), (1, 1, 300, 384)]
EPS = 1e-6


def shape_id(shape):
    return "B{}-F{}-T{}-D{}".format(*shape)


def make(shape, dtype, *, rows=1, affine=False):
    """``x``, ``y``, ``gate``, ``shift`` and ``scale``; tokens are slices of wider rows, the rest is poison."""
    b, frames, tokens, d = shape

    def draw():
        wide = torch.full((b, frames * tokens + 1, d + 16), float("nan"), dtype=dtype)
        wide[:, 1:, :d] = torch.randn(b, frames * tokens, d) * 3 + 1
        return wide[:, 1:, :d]

    def vector(one):
        return torch.randn(*((d,) if affine and one else (rows, frames, 1, d))).to(dtype)

    return draw(), draw(), vector(False), vector(True), vector(True)


def plain(x, y, gate, shift, scale):
    """The same in PyTorch, in the dtype of the arguments."""
    frames = next((v.shape[1] for v in (gate, scale) if v is not None and v.ndim == 4), 1)
    by_frame = (x.shape[0], frames, -1, x.shape[-1])
    if y is not None:
        x = (x.reshape(by_frame) + (1 if gate is None else gate) * y.reshape(by_frame)).view(x.shape)
    norm = torch.layer_norm(x, x.shape[-1:], eps=EPS).reshape(by_frame)
    return x, (norm * scale + shift).view(x.shape)


def wide(args):
    return [None if x is None else x.double() for x in args]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_gated_sum_and_its_norm_match_float64(isa, shape, dtype):
    args = make(shape, dtype, rows=shape[0])
    for actual, budget, exact in zip(
        _cpu.gated_modulate(*args, EPS, isa=isa), plain(*args), plain(*wide(args)), strict=True
    ):
        assert actual.is_contiguous()
        assert_no_worse_than(actual, budget, exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_parts_may_be_left_out(isa, dtype):
    x, y, gate, shift, scale = make((2, 3, 5, 48), dtype)
    same, norm = _cpu.gated_modulate(x, None, None, shift, scale, EPS, isa=isa)
    assert same is x
    assert_no_worse_than(norm, plain(x, None, None, shift, scale)[1], plain(*wide((x, None, None, shift, scale)))[1])
    added, none = _cpu.gated_modulate(x, y, gate, None, None, isa=isa)
    assert none is None
    assert_no_worse_than(added, plain(x, y, gate, shift, scale)[0], plain(*wide((x, y, gate, shift, scale)))[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_an_affine_norm(isa, dtype, gated):
    x, y, gate, shift, scale = make((2, 3, 5, 48), dtype, affine=True)
    args = x, y, gate if gated else None, shift, scale
    for actual, budget, exact in zip(
        _cpu.gated_modulate(*args, EPS, isa=isa), plain(*args), plain(*wide(args)), strict=True
    ):
        assert_no_worse_than(actual, budget, exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_rms_norm_matches_float64(isa, shape, dtype):
    x, weight = make(shape, dtype)[0], torch.randn(shape[-1]).to(dtype)
    budget = torch.rms_norm(x, weight.shape, weight, EPS)
    exact = torch.rms_norm(x.double(), weight.shape, weight.double(), EPS)
    assert_no_worse_than(_cpu.rms_norm(x, weight, EPS, isa=isa), budget, exact)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_large_mean_does_not_drown_the_variance(isa):
    x = torch.randn(1, 4, 384) + 1000
    ones, zeros = torch.ones(384), torch.zeros(384)
    exact = torch.layer_norm(x.double(), (384,), eps=EPS)
    _, norm = _cpu.gated_modulate(x, None, None, zeros, ones, EPS, isa=isa)
    assert_no_worse_than(norm, torch.layer_norm(x, (384,), eps=EPS), exact)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_number_of_threads_changes_no_bit(isa, threads):
    args, results = make((2, 1, 300, 384), torch.float32), []
    for count in (1, 2, 3):
        threads(count)
        results.append(_cpu.gated_modulate(*args, EPS, isa=isa))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@needs_kernels
@pytest.mark.parametrize(
    ("x", "others", "reason"),
    [
        (torch.zeros(1, 2, 32), (torch.zeros(32), None), None),
        (torch.zeros(1, 2, 24), (), "width 24 is no multiple of 16 up to 8192"),
        (torch.zeros(1, 2, 8208), (), "width 8208 is no multiple of 16 up to 8192"),
        (torch.zeros(1, 2, 32).half(), (), "no CPU kernel is built for torch.float16"),
        (torch.zeros(1, 2, 32), (torch.zeros(32).bfloat16(),), "a tensor is torch.bfloat16"),
        (torch.zeros(1, 2, 64)[..., ::2], (), "with strides (128, 64, 2)"),
        (torch.zeros(1, 2, 32, device="meta"), (), "a tensor is on meta"),
    ],
)
def test_says_why_it_cannot_run(x, others, reason):
    said = _cpu.why_not_norm(x, *others)
    assert said is None if reason is None else reason in said


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 15, 2, 24)}, "x must be float32 or bfloat16 of 3 dims"),
        ({"x": (2, 15, 40)}, "the last dim of x must be a multiple of 16 up to 8192, got 40"),
        ({"y": (2, 14, 48)}, r"y is float32 \(2, 14, 48\)"),
        ({"gate": (3, 3, 48)}, r"gate is float32 \(3, 3, 48\)"),
        ({"shift": (1, 4, 48)}, r"shift is float32 \(1, 4, 48\)"),
        ({"scale": (1, 3, 32)}, r"scale is float32 \(1, 3, 32\)"),
        ({"scale": (1, 5, 48)}, "scale has 5 frames, another vector 3"),
        ({"sum": (2, 15, 32)}, r"sum must be \(2, 15, 48\), .* got \(2, 15, 32\)"),
        ({"out": (1, 15, 48)}, r"out must be \(2, 15, 48\), .* got \(1, 15, 48\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_binding_rejects_what_python_missed(change, message):
    shapes = {**dict.fromkeys(("x", "y", "sum", "out"), (2, 15, 48)), "gate": (1, 3, 48)}
    shapes |= {"shift": (1, 3, 48), "scale": (2, 3, 48)} | change
    kept = {name: torch.zeros(shape) for name, shape in shapes.items()}
    views = {name: _native.view(x) for name, x in kept.items()}
    with pytest.raises(ValueError, match=f"echo_ext: .*{message}"):
        _native.module().norm_cpu(**views, eps=EPS, centred=True, threads=1)
