"""stream_attention: one float64 softmax as the oracle, every subset of tiers, contract, autograd, torch.compile."""

import itertools

import pytest
import torch
from attention_cases import TIERS, one_softmax, positional
from numerics import assert_no_worse_than, assert_same_bits

from echo_ext import _attention, _native
from echo_ext.attention import frame_shift, padded_attention, stream_attention, stream_attention_ref
from echo_ext.rope import frame_table, grid_table, rope_rotate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(TIERS, n)]
# (B, Tq, (sink, memory, ring) keys, H, d): one token each; ragged; past a tile; the official heads scaled down.
SHAPES = [
    (1, 1, (1, 1, 1), 1, 6),
    (2, 5, (3, 2, 7), 3, 16),
    (1, 33, (31, 65, 129), 1, 64),
    (1, 12, (12, 12, 36), 12, 128),
]


def shape_id(shape):
    B, Tq, Tk, H, d = shape
    return f"B{B}-Tq{Tq}-Tk{'+'.join(map(str, Tk))}-H{H}-d{d}"


def make(shape, dtype=torch.float32, device="cpu", *, tiers=TIERS, strided=False, shift=True, requires_grad=False):
    """Keyword arguments of the op."""
    B, Tq, lengths, H, d = shape

    def draw(length):
        # Strided tensors are slices of a longer buffer with wider heads, as a view of the ring is; the rest is poison.
        wide = torch.full((B, length + 3 * strided, H, d + 16 * strided), float("nan"), device=device, dtype=dtype)
        wide[:, strided : length + strided, :, :d] = torch.randn(B, length, H, d, device=device)
        return wide[:, strided : length + strided, :, :d].requires_grad_(requires_grad)

    args = {tier: (draw(n), draw(n)) for tier, n in zip(TIERS, lengths, strict=True) if tier in tiers}
    return {"q": draw(Tq), **args, "shift": frame_shift(18, 345_600, d, device=device) if shift else None}


@pytest.fixture
def through_the_op(monkeypatch):
    """Send CPU tensors down the kernel's path (op, autograd, fake), ending in the CPU implementation."""
    monkeypatch.setitem(_attention._WHY_NOT, "kernel_sm80", lambda x: None)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_one_softmax_over_all_tiers(device, shape, dtype, strided):
    args = make(shape, dtype, device, strided=strided)
    exact, _ = one_softmax(**args)
    out = stream_attention(**args)
    assert_no_worse_than(out, exact.to(dtype), exact)
    reference, _ = stream_attention_ref(*positional(args))
    assert_no_worse_than(reference, exact.to(dtype), exact)


@pytest.mark.parametrize("shift", [False, True], ids=["one frame of reference", "shifted"])
@pytest.mark.parametrize("tiers", SUBSETS, ids="+".join)
@pytest.mark.parametrize("device", DEVICES)
def test_any_tier_may_be_absent_or_empty(device, tiers, shift):
    args = make(SHAPES[1], tiers=tiers, shift=shift, device=device)
    exact, _ = one_softmax(**args)
    assert_no_worse_than(stream_attention(**args), exact.float(), exact)
    empty = args["q"][:, :0], args["q"][:, :0]
    padded = {tier: args.get(tier, empty) for tier in TIERS}
    assert_no_worse_than(stream_attention(args["q"], **padded, shift=args["shift"]), exact.float(), exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tiers", [("ring",), TIERS], ids="+".join)
@pytest.mark.parametrize("device", DEVICES)
def test_log_sum_exp_covers_every_key(device, tiers, dtype):
    args = make(SHAPES[1], dtype, device, tiers=tiers)
    _, exact = one_softmax(**args)
    for run in (torch.ops.echo_ext.stream_attention, stream_attention_ref):
        out, lse = run(*positional(args))
        assert out.dtype == dtype
        budget = exact.to(dtype).float()  # the turned query is rounded to its dtype
        assert_no_worse_than(lse, budget, exact)


@pytest.mark.parametrize("shift", [False, True], ids=["one frame of reference", "shifted"])
def test_shift_equals_queries_at_their_relative_ids(shift):
    """The reason for the shift: ring keys stay at absolute ids, sink and memory see relative ones."""
    d, start, relative = 64, 345_600 if shift else 18, 18
    grid = grid_table([0, 0, 1, 1], [0, 1, 0, 1], d)

    def at(x, first, frames):
        return rope_rotate(x, frame_table(list(range(first, first + frames)), d), grid)

    q, sink, memory, ring = (torch.randn(2, 4 * n, 3, d) for n in (3, 3, 3, 9))
    values = {tier: torch.randn_like(x) for tier, x in (("sink", sink), ("memory", memory), ("ring", ring))}
    fixed = {"sink": (at(sink, 0, 3), values["sink"]), "memory": (at(memory, 9, 3), values["memory"])}
    by = frame_shift(relative, start, d) if shift else None
    out = stream_attention(at(q, start, 3), **fixed, ring=(at(ring, start - 6, 9), values["ring"]), shift=by)
    inside = {"q": at(q, relative, 3), **fixed, "ring": (at(ring, relative - 6, 9), values["ring"])}
    exact, _ = one_softmax(**inside)
    assert_no_worse_than(out, stream_attention(**inside), exact)


def test_every_stream_of_a_batch_can_have_its_own_shift():
    args = make(SHAPES[1])
    args["shift"] = frame_shift(torch.tensor([18, 18]), torch.tensor([18, 345_600]), 16)
    out = stream_attention(**args)
    for b in range(2):
        row = {tier: tuple(x[b : b + 1] for x in args[tier]) for tier in TIERS}
        alone = stream_attention(args["q"][b : b + 1], **row, shift=args["shift"][b : b + 1])
        assert_no_worse_than(out[b : b + 1], alone, alone)


def test_order_of_ring_frames_does_not_matter():
    args = make(SHAPES[2])
    order = torch.randperm(129)
    exact, _ = one_softmax(**args)
    args["ring"] = tuple(x[:, order] for x in args["ring"])
    assert_no_worse_than(stream_attention(**args), exact.float(), exact)


@pytest.mark.parametrize("winner", TIERS)
def test_survives_scores_that_overflow_exp(winner):
    args = make(SHAPES[1], shift=False)
    for tier in TIERS:
        k, v = args[tier]
        args[tier] = k * (1e3 if tier == winner else 1.0), v
    args["q"] = args["q"] * 1e3
    exact, _ = one_softmax(**args)
    assert_no_worse_than(stream_attention(**args), exact.float(), exact)


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_survives_scores_all_far_from_zero(size):
    args = make(SHAPES[1], shift=False)
    args["q"] = args["q"].abs() + 1
    for tier in TIERS:
        args[tier] = args[tier][0] + size, args[tier][1]
    exact, _ = one_softmax(**args)
    assert_no_worse_than(stream_attention(**args), stream_attention_ref(*positional(args))[0], exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zero_queries_average_all_values(dtype):
    args = make(SHAPES[1], dtype)
    args["q"] = torch.zeros_like(args["q"])
    exact = torch.cat([args[tier][1].double() for tier in TIERS], 1).mean(1, keepdim=True).expand_as(args["q"])
    assert_no_worse_than(stream_attention(**args), exact.to(dtype), exact)


def test_scale_can_be_chosen():
    args = make(SHAPES[1])
    exact, _ = one_softmax(**args, scale=0.9)
    assert_no_worse_than(stream_attention(**args, scale=0.9), exact.float(), exact)


@pytest.mark.parametrize("padding", [0, 1, 2, 11, 12])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_padding_that_is_all_the_same_changes_nothing(dtype, padding):
    q, k, v = (torch.randn(2, n, 3, 16).to(dtype) for n in (5, 12, 12))
    for x in (k, v):
        x[:, 12 - padding :] = x[:, -1:].clone()
    exact, _ = one_softmax(q, ring=(k, v))
    assert_no_worse_than(padded_attention(q, k, v, padding), exact.to(dtype), exact)


def test_gradients_of_padded_attention():
    q, k, v = (torch.randn(1, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
    assert torch.autograd.gradcheck(lambda *args: padded_attention(*args, 2), (q, k, v))


@pytest.mark.parametrize("padding", [-1, 13])
def test_padding_beyond_the_keys_is_refused(padding):
    x = torch.randn(2, 12, 3, 16)
    with pytest.raises(ValueError, match=rf"padding must be in 0 .. 12, the number of keys, got {padding}"):
        padded_attention(x, x, x, padding)


GRADIENTS = [(TIERS, True), (TIERS, False), (("ring",), True)]


def gradients(tiers, shift):
    args = make((1, 2, (2, 1, 2), 1, 6), torch.float64, tiers=tiers, shift=shift, requires_grad=True)

    def f(q, *rest):
        pairs = dict(zip(tiers, zip(rest[::2], rest[1::2], strict=True), strict=True))
        return stream_attention(q, **pairs, shift=args["shift"])

    return torch.autograd.gradcheck(f, (args["q"], *(x for tier in tiers for x in args[tier])))


@pytest.mark.parametrize(("tiers", "shift"), GRADIENTS, ids=["all shifted", "all", "ring"])
def test_gradients_of_reference(tiers, shift):
    assert gradients(tiers, shift)


@pytest.mark.parametrize(("tiers", "shift"), GRADIENTS, ids=["all shifted", "all", "ring"])
def test_gradients_of_op(tiers, shift, through_the_op):
    assert gradients(tiers, shift)


def test_output_is_the_same_whether_a_gradient_is_wanted_or_not():
    args = make(SHAPES[1], torch.float64)
    plain = stream_attention(**args)
    args["q"].requires_grad_()
    assert_no_worse_than(stream_attention(**args).detach(), plain, plain)


def test_op_leaves_out_gradients_nobody_wants(through_the_op):
    args = make(SHAPES[1])
    args["memory"][1].requires_grad_()
    stream_attention(**args).sum().backward()
    assert args["memory"][1].grad is not None
    others = [args["q"], args["memory"][0], *args["sink"], *args["ring"]]
    assert all(x.grad is None for x in others)


@pytest.mark.parametrize("device", DEVICES)
def test_op_registration(device):
    for (tiers, shift), dtype in zip(GRADIENTS, DTYPES.values(), strict=True):
        args = make(SHAPES[1], dtype, device, tiers=tiers, shift=shift, strided=True)
        torch.library.opcheck(torch.ops.echo_ext.stream_attention.default, positional(args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["op", "fallback"])
@torch.no_grad()
def test_compiles_without_graph_break(device, path, request):
    if path == "op":
        request.getfixturevalue("through_the_op")
    args = make(SHAPES[1], device=device)
    out = torch.compile(lambda a: stream_attention(**a), fullgraph=True, backend="aot_eager")(args)
    assert_same_bits(out, stream_attention(**args))


def test_fallback_compiles_for_training_without_graph_break():
    args = make(SHAPES[1], requires_grad=True)
    out = torch.compile(lambda a: stream_attention(**a), fullgraph=True, backend="aot_eager")(args)
    expected = stream_attention(**args)
    assert_no_worse_than(out, expected, expected)
    for x, y in zip(*(torch.autograd.grad(o.square().sum(), args["ring"]) for o in (out, expected)), strict=True):
        assert_no_worse_than(x, y, y)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def pair(*shape, dtype=torch.float32):
    return zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 4, 32)}, r"q must be \(B, T, H, d\), got \(2, 4, 32\)"),
        ({"q": zeros(2, 4, 2, 32)[..., ::2]}, r"q must have a contiguous last dim, got strides \(256, 64, 32, 2\)"),
        ({"ring": tuple(x[..., ::2] for x in pair(2, 5, 2, 32))}, "ring must have a contiguous last dim, got strides"),
        ({"ring": pair(1, 5, 2, 16)}, r"ring keys and values must be \(2, T, 2, 16\) to match q, got \(1, 5, 2, 16\)"),
        (
            {"sink": (zeros(2, 5, 2, 16), zeros(2, 4, 2, 16))},
            r"sink keys and values .* \(2, 5, 2, 16\), \(2, 4, 2, 16\)",
        ),
        (
            {"memory": pair(2, 5, 2, 16, dtype=torch.float16)},
            "memory is torch.float16 on cpu, q is torch.float32 on cpu",
        ),
        ({"ring": None}, "no tier holds a key: pass at least the ring with the current block"),
        ({"ring": pair(2, 0, 2, 16)}, "no tier holds a key"),
        ({"shift": zeros(1, 3, 2)}, r"shift must be \(1 or 2, 4, 2\) for d=16, got \(1, 3, 2\)"),
        ({"shift": zeros(3, 4, 2)}, r"shift must be \(1 or 2, 4, 2\) for d=16, got \(3, 4, 2\)"),
        ({"shift": zeros(1, 4, 2).to("meta")}, "shift is on meta, q is on cpu"),
        ({"backend": "cuda"}, "backend must be 'auto', .*, 'library' or 'reference', got 'cuda'"),
    ],
)
def test_rejects(change, message):
    args = {"q": zeros(2, 4, 2, 16), "ring": pair(2, 5, 2, 16), **change}
    with pytest.raises(ValueError, match=message):
        stream_attention(**args)


def test_kernel_asked_for_by_name_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="stream_attention: kernel can't run: q is on cpu"):
        stream_attention(**make(SHAPES[1]), backend="kernel")


@pytest.mark.gpu
def test_kernel_runs_or_says_that_the_build_lacks_it():
    args = make(SHAPES[3], torch.bfloat16, "cuda")
    if hasattr(_native.module(), "stream_attention_fwd"):
        assert stream_attention(**args, backend="kernel").is_cuda
    else:
        with pytest.raises(RuntimeError, match="this build has no stream_attention kernel"):
            stream_attention(**args, backend="kernel")


@pytest.mark.gpu
def test_graph_replay_sees_new_inputs():
    args = make(SHAPES[3], torch.bfloat16, "cuda")
    stream_attention(**args)  # the first call loads modules; capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stream_attention(**args)
    for x in (args["q"], *(x for tier in TIERS for x in args[tier])):
        x.normal_()
    args["shift"].copy_(frame_shift(18, 30, 128))
    graph.replay()
    assert_same_bits(out, stream_attention(**args))
