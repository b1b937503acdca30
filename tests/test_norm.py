"""modulate, gated_add, gated_modulate: op vs plain formula in float64; contract; autograd; torch.compile."""

import pytest
import torch
from numerics import assert_no_worse_than, assert_same_bits

from echo_ext import _native
from echo_ext.norm import gated_add, gated_add_ref, gated_modulate, gated_modulate_ref, modulate, modulate_ref

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
EPS = 1e-3  # large enough to show
# (B, F, T_f, D): one token; ragged; a frame a token; the official width.
SHAPES = [(1, 1, 1, 8), (2, 3, 5, 48), (2, 7, 1, 24), (1, 2, 3, 1536)]
# What each op takes after x.
ARGUMENTS = {
    "modulate": ("shift", "scale"),
    "gated_add": ("y", "gate"),
    "gated_modulate": ("y", "gate", "shift", "scale"),
    "add, then modulate": ("y", None, "shift", "scale"),
    "add, then norm": ("y", None, "bias", "weight"),
    "gated, then norm": ("y", "gate", "bias", "weight"),
}
OPS = {"modulate": (modulate, modulate_ref), "gated_add": (gated_add, gated_add_ref)}
BOTH = gated_modulate, gated_modulate_ref


def shape_id(shape):
    return "B{}-F{}-T{}-D{}".format(*shape)


def make(shape, dtype=torch.float32, device="cpu", *, strided=False, rows=None, requires_grad=False):
    """Tensors by name; vectors have a row a batch element unless ``rows`` is 1."""
    B, F, T, D = shape

    def draw(*sizes):
        # Strided tensors are slices of a buffer with more and wider rows; the rest is poison.
        wide = torch.full((*sizes[:-2], sizes[-2] + strided, sizes[-1] + 16 * strided), float("nan"), device=device)
        wide[..., : sizes[-2], : sizes[-1]] = torch.randn(sizes, device=device)
        return wide.to(dtype)[..., : sizes[-2], : sizes[-1]].requires_grad_(requires_grad)

    names = {name: draw(B, F * T, D) for name in "xy"}
    names |= {name: draw(rows or B, F, 1, D) for name in ("gate", "shift", "scale")}
    return names | {name: draw(1, D)[0] for name in ("weight", "bias")}


def arguments(case, tensors):
    """Positional arguments of the op, without eps."""
    return [tensors["x"], *(None if name is None else tensors[name] for name in ARGUMENTS[case])]


def call(case, tensors, **kwargs):
    """All that the op returns, as a list."""
    op = OPS.get(case, BOTH)[0]
    out = op(*arguments(case, tensors), *([] if case == "gated_add" else [EPS]), **kwargs)
    return list(out) if isinstance(out, tuple) else [out]


def reference(case, tensors):
    op = OPS.get(case, BOTH)[1]
    out = op(*arguments(case, tensors), *([] if case == "gated_add" else [EPS]))
    return list(out) if isinstance(out, tuple) else [out]


def plain(case, tensors):
    """The formula token by token, in float64."""
    x, y, gate, shift, scale, weight, bias = (tensors[n].detach().double() for n in tensors)
    frames, tokens = gate.shape[1], x.shape[1]

    def spread(v):
        return v.expand(x.shape[0], -1, -1, -1).repeat_interleave(tokens // frames, dim=1).flatten(1, 2)

    names = ARGUMENTS[case]
    total = x
    if "y" in names:
        total = x + (spread(gate) * y if "gate" in names else y)
    centred = total - total.mean(-1, keepdim=True)
    norm = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    out = norm * weight + bias if "weight" in names else norm * spread(scale) + spread(shift)
    return {"modulate": [out], "gated_add": [total]}.get(case, [total, out])


def assert_op(case, tensors, **kwargs):
    outs = call(case, tensors, **kwargs)
    for out, budget, exact in zip(outs, reference(case, tensors), plain(case, tensors), strict=True):
        assert_no_worse_than(out, budget, exact)
        assert_no_worse_than(out, exact.to(out.dtype), exact)
    return outs


@pytest.fixture
def through_the_op(monkeypatch):
    """Send CPU tensors down the kernel's path (op, autograd, fake), ending in the CPU implementation."""
    monkeypatch.setattr("echo_ext.norm._why_not_kernel", lambda *args: None)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_the_formula_in_float64(device, case, shape, dtype, strided):
    assert_op(case, make(shape, dtype, device, strided=strided))


@pytest.mark.parametrize("case", ARGUMENTS)
def test_one_row_of_vectors_serves_all_streams(case):
    assert_op(case, make(SHAPES[1], rows=1))


def test_sum_and_norm_together_equal_one_after_the_other():
    t = make(SHAPES[1])
    total, out = gated_modulate(t["x"], t["y"], t["gate"], t["shift"], t["scale"], EPS)
    assert_same_bits(total, gated_add(t["x"], t["y"], t["gate"]))
    assert_same_bits(out, modulate(total, t["shift"], t["scale"], EPS))


@pytest.mark.parametrize("case", ["modulate", "add, then norm"])
def test_constant_and_huge_tokens_stay_finite(case):
    t = make(SHAPES[1])
    t["x"][:, :5], t["x"][:, 5:10], t["y"][:, :10] = 3.0, 1e15 * t["x"][:, 5:10], 0.0
    out = call(case, t)[-1]
    expected = t["bias"] if case == "add, then norm" else t["shift"][:, :1, 0]
    assert_no_worse_than(out[:, :5], expected.expand(2, 5, 48), expected.expand(2, 5, 48))
    assert_no_worse_than(out[:, 5:10], *(x[-1][:, 5:10] for x in (reference(case, t), plain(case, t))))


@pytest.mark.parametrize("path", ["fallback", "op"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_gradients(case, path, request):
    if path == "op":
        request.getfixturevalue("through_the_op")
    t = {name: x.detach().double().requires_grad_() for name, x in make((2, 2, 2, 6), rows=1).items()}
    inputs = [x for x in arguments(case, t) if x is not None]

    def function(*given):
        names = [name for name in ("x", *ARGUMENTS[case]) if name is not None]
        return tuple(call(case, t | dict(zip(names, given, strict=True))))

    assert torch.autograd.gradcheck(function, inputs)


def test_op_leaves_out_gradients_nobody_wants(through_the_op):
    t = make(SHAPES[1])
    t["gate"].requires_grad_()
    gated_modulate(t["x"], t["y"], t["gate"], t["shift"], t["scale"], EPS)[0].sum().backward()
    assert t["gate"].grad is not None
    assert all(x.grad is None for name, x in t.items() if name != "gate")


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("device", DEVICES)
def test_op_registration(device, case):
    t = make(SHAPES[1], device=device, strided=True)
    op = getattr(torch.ops.echo_ext, case if case in OPS else "gated_modulate").default
    torch.library.opcheck(op, (*arguments(case, t), *([] if case == "gated_add" else [EPS])))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_break(device, through_the_op):
    t = make(SHAPES[1], device=device)

    def layer(t):
        return [x for case in ARGUMENTS for x in call(case, t)]

    assert_same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(t), layer(t))


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("modulate", {"x": zeros(6, 8)}, r"x must be \(B, T, D\), got \(6, 8\)"),
        ("modulate", {"shift": zeros(2, 3, 8)}, r"shift must be \(1 or 2, F, 1, 8\) to match x .*, got \(2, 3, 8\)"),
        ("modulate", {"scale": zeros(3, 3, 1, 8)}, r"scale must be \(1 or 2, F, 1, 8\) .*, got \(3, 3, 1, 8\)"),
        ("modulate", {"scale": zeros(2, 3, 1, 4)}, r"scale must be \(1 or 2, F, 1, 8\) .*, got \(2, 3, 1, 4\)"),
        ("modulate", {"shift": zeros(2, 4, 1, 8)}, "shift has 4 frames, which don't divide the 6 tokens of x"),
        ("modulate", {"shift": zeros(2, 0, 1, 8)}, "shift has 0 frames, which don't divide the 6 tokens of x"),
        ("modulate", {"scale": zeros(2, 2, 1, 8)}, "scale has 2 frames, the vectors before it 3"),
        ("modulate", {"scale": zeros(2, 3, 1, 8).to("meta")}, "scale is on meta, x is on cpu"),
        ("modulate", {"shift": zeros(8), "scale": zeros(8)}, r"shift must be \(1 or 2, F, 1, 8\)"),
        ("gated_add", {"y": zeros(2, 5, 8)}, r"y must be \(2, 6, 8\) on cpu to match x, got \(2, 5, 8\) on cpu"),
        ("gated_add", {"y": zeros(2, 6, 8).to("meta")}, r"y must be \(2, 6, 8\) on cpu .* on meta"),
        ("gated_add", {"gate": zeros(8)}, r"gate must be \(1 or 2, F, 1, 8\)"),
        ("gated, then norm", {"weight": zeros(4)}, r"scale must be \(8,\) to match x \(2, 6, 8\), got \(4,\)"),
        ("gated, then norm", {"weight": zeros(1, 3, 1, 8)}, r"scale must be \(8,\) .*, got \(1, 3, 1, 8\)"),
        ("gated_modulate", {"shift": zeros(2, 1, 1, 8)}, "shift has 1 frames, the vectors before it 3"),
    ],
)
def test_rejects(case, change, message):
    tensors = make((2, 3, 2, 8)) | change
    with pytest.raises(ValueError, match=message):
        call(case, tensors)


def test_rejects_an_unknown_backend():
    with pytest.raises(ValueError, match="gated_add: backend must be 'auto', 'kernel' or 'reference', got 'cuda'"):
        call("gated_add", make(SHAPES[0]), backend="cuda")


@pytest.mark.parametrize("case", ["modulate", "gated_add", "gated_modulate"])
def test_kernel_asked_for_by_name_says_why_it_cannot_run(case):
    with pytest.raises(RuntimeError, match=f"{case}: kernel can't run: x is on cpu"):
        call(case, make(SHAPES[1]), backend="kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ARGUMENTS)
def test_kernel_runs_on_this_device(case):
    assert _native.module().cuda_version is not None
    assert_op(case, make(SHAPES[3], torch.bfloat16, "cuda"), backend="kernel")


@pytest.mark.gpu
def test_graph_replay_sees_new_inputs():
    t = make(SHAPES[3], torch.bfloat16, "cuda")

    def every():
        return [x for case in ARGUMENTS for x in call(case, t)]

    every()  # the first call loads modules; capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = every()
    for x in t.values():
        x.normal_()
    graph.replay()
    assert_same_bits(out, every())
