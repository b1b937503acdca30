"""memory_xattn, gate_blend, memory_write: op vs float64 oracle; contract; autograd; torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import WHY_NONE
from numerics import assert_no_worse_than
from torch import nn

from echo_ext import memory
from echo_ext.gate import gate_blend, gate_blend_ref
from echo_ext.memory import WriteGate, WriteLayer, memory_write, memory_xattn, memory_xattn_ref
from echo_ext.rope import frame_table, grid_table, rope_rotate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
EPS = 1e-6
# (B, Tq, Tk a segment, H, d): one token; ragged; wrapped ring; sink + wrapped ring; the official heads scaled down.
SHAPES = [
    (1, 1, (1,), 1, 16),
    (2, 5, (7,), 3, 16),
    (1, 48, (32, 16), 2, 64),
    (2, 33, (1, 31, 65), 1, 64),
    (1, 18, (36,), 12, 128),
]


def shape_id(shape):
    B, Tq, Tk, H, d = shape
    return f"B{B}-Tq{Tq}-Tk{'+'.join(map(str, Tk))}-H{H}-d{d}"


def make_xattn(shape, dtype=torch.float32, device="cpu", *, strided=False, requires_grad=False):
    """Positional arguments of the op: q, keys, values, norm_weight, eps, scale, q_frames, q_grid."""
    B, Tq, lengths, H, d = shape

    def draw(length):
        # Strided tensors are slices of a longer buffer with wider heads, as a view of the ring is; the rest is poison.
        wide = torch.full((B, length + 3 * strided, H, d + 16 * strided), float("nan"), device=device, dtype=dtype)
        wide[:, :length, :, :d] = torch.randn(B, length, H, d, device=device)
        return wide[:, :length, :, :d].requires_grad_(requires_grad)

    norm = (1 + 0.1 * torch.randn(H * d, device=device)).to(dtype).requires_grad_(requires_grad)
    keys, values = [draw(n) for n in lengths], [draw(n) for n in lengths]
    return draw(Tq), keys, values, norm, EPS, d**-0.5, None, None


def call_xattn(q, keys, values, norm_weight, eps, scale, q_frames, q_grid, **kwargs):
    q_rope = None if q_frames is None else (q_frames, q_grid)
    segments = list(zip(keys, values, strict=True))
    return memory_xattn(q, segments, norm_weight=norm_weight, eps=eps, scale=scale, q_rope=q_rope, **kwargs)


def in_float64(args):
    if isinstance(args, torch.Tensor):
        return args.detach().double()
    return [in_float64(x) for x in args] if isinstance(args, list | tuple) else args


def rope_tables(frames, rows, columns, d, device="cpu"):
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    grid = grid_table(cells[:, 0], cells[:, 1], d, device=device)
    return frame_table(torch.arange(frames), d, device=device), grid


def make_gate(B, T, D, dtype=torch.float32, device="cpu", *, strided=False, requires_grad=False):
    def draw(*shape, size=1.0):
        wide = torch.full((*shape[:-1], shape[-1] * (1 + strided)), float("nan"), device=device, dtype=dtype)
        wide[..., : shape[-1]] = size * torch.randn(shape, device=device)
        return wide[..., : shape[-1]].requires_grad_(requires_grad)

    return draw(B, T, D), draw(B, T, D), draw(D, 2 * D, size=D**-0.5), draw(D)


@pytest.fixture
def through_the_op(monkeypatch):
    """Send CPU tensors down the kernel's path (op, autograd, fake), ending in the CPU implementation."""
    monkeypatch.setattr("echo_ext.memory._why_not_kernel", lambda *args: None)
    monkeypatch.setattr("echo_ext.gate._why_not_kernel", lambda *args: None)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("device", DEVICES)
def test_xattn_matches_reference(device, shape, dtype, strided):
    args = make_xattn(shape, dtype, device, strided=strided)
    assert_no_worse_than(call_xattn(*args), memory_xattn_ref(*args), memory_xattn_ref(*in_float64(args)))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_xattn_reads_segments_as_one_sequence(shape):
    q, keys, values, norm, _, scale, *_ = make_xattn(shape, torch.float64)
    out = memory_xattn(q, list(zip(keys, values, strict=True)), norm_weight=norm)
    normed = F.rms_norm(q.flatten(2), norm.shape, norm, EPS).view_as(q)
    k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
    scores = torch.einsum("bihd,bjhd->bhij", normed, k) * scale
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    assert_no_worse_than(out, expected, expected)


def test_xattn_without_a_norm_takes_queries_as_they_are():
    q, keys, values, norm, *_ = make_xattn((2, 5, (7,), 3, 16), torch.float64)
    segments = list(zip(keys, values, strict=True))
    normed = F.rms_norm(q.flatten(2), norm.shape, norm, EPS).view_as(q)
    expected = memory_xattn(q, segments, norm_weight=norm)
    assert_no_worse_than(memory_xattn(normed, segments), expected, expected)
    assert not torch.equal(memory_xattn(q, segments), expected)


@pytest.mark.parametrize("frame_rows", [1, 2])
def test_xattn_rotates_queries_after_the_norm(frame_rows):
    q, keys, values, norm, *_ = make_xattn((2, 12, (7,), 3, 16), torch.float64)
    frames, grid = rope_tables(2, 2, 3, 16)
    frames = frames.repeat(frame_rows, 1, 1, 1)
    segments = list(zip(keys, values, strict=True))
    normed = F.rms_norm(q.flatten(2), norm.shape, norm, EPS).view_as(q)
    expected = memory_xattn(rope_rotate(normed, frames, grid), segments)
    out = memory_xattn(q, segments, norm_weight=norm, q_rope=(frames, grid))
    assert_no_worse_than(out, expected, expected)


@pytest.mark.parametrize("lengths", [(6,), (4, 2)], ids=["one segment", "two segments"])
def test_xattn_survives_scores_that_overflow_exp(lengths):
    q, keys, values, *_ = make_xattn((1, 4, lengths, 2, 16))
    segments = [(k * 1e3, v) for k, v in zip(keys, values, strict=True)]
    out = memory_xattn(q * 1e3, segments)
    scores = torch.einsum("bihd,bjhd->bhij", q, torch.cat(keys, dim=1))
    chosen = torch.cat(values, dim=1).transpose(1, 2).gather(2, scores.argmax(-1)[..., None].expand(-1, -1, -1, 16))
    assert_no_worse_than(out, chosen.transpose(1, 2), chosen.transpose(1, 2))


def test_xattn_of_zero_queries_averages_the_values():
    q, keys, values, norm, *_ = make_xattn((1, 4, (3, 5), 2, 16), torch.float64)
    out = memory_xattn(torch.zeros_like(q), list(zip(keys, values, strict=True)), norm_weight=norm)
    expected = torch.cat(values, dim=1).mean(dim=1, keepdim=True).expand_as(q)
    assert_no_worse_than(out, expected, expected)


@pytest.mark.parametrize("change", [None, "strided", "gradient"])
def test_a_lone_segment_is_read_as_a_stream_only_where_that_has_no_limits(change, monkeypatch):
    q, keys, values, *_ = make_xattn((2, 5, (7,), 3, 16), requires_grad=change == "gradient")
    if change == "strided":
        keys = [torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in keys]
    streams, plain = [], memory.stream_attention
    monkeypatch.setattr(memory, "stream_attention", lambda q, **rest: streams.append(q) or plain(q, **rest))
    out = memory_xattn(q, list(zip(keys, values, strict=True)))
    assert len(streams) == (change is None and not WHY_NONE)
    args = q, keys, values, None, EPS, 0.25, None, None
    assert_no_worse_than(out.detach(), memory_xattn_ref(*args).detach(), memory_xattn_ref(*in_float64(args)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 48), (1, 48, 128)], ids=lambda s: "B{}-T{}-D{}".format(*s))
@pytest.mark.parametrize("device", DEVICES)
def test_gate_matches_reference(device, shape, dtype, strided):
    args = make_gate(*shape, dtype, device, strided=strided)
    assert_no_worse_than(gate_blend(*args), gate_blend_ref(*args), gate_blend_ref(*in_float64(args)))


def test_gate_matches_the_formula_on_the_concatenation():
    state, proposal, weight, bias = make_gate(2, 7, 48, torch.float64)
    g = torch.sigmoid(torch.cat([state, proposal], dim=-1) @ weight.T + bias)
    expected = g * state + (1 - g) * proposal
    assert_no_worse_than(gate_blend(state, proposal, weight, bias), expected, expected)


@pytest.mark.parametrize("logit", [200.0, -200.0])
def test_saturated_gate_keeps_or_replaces_bit_for_bit(logit):
    state, proposal, weight, bias = make_gate(2, 5, 16)
    out = gate_blend(state, proposal, torch.zeros_like(weight), torch.full_like(bias, logit))
    assert torch.equal(out, state if logit > 0 else proposal)


def test_gate_keeps_a_state_wider_than_the_weights():
    state, proposal, weight, bias = make_gate(2, 5, 16)
    weight, bias = torch.zeros_like(weight).bfloat16(), torch.full_like(bias, 200.0).bfloat16()
    assert torch.equal(gate_blend(state, proposal, weight, bias), state)


def gradients_of_xattn(shape, with_rope):
    q, keys, values, norm, *_ = make_xattn(shape, torch.float64, requires_grad=True)
    rope = rope_tables(shape[1], 1, 1, shape[4]) if with_rope else None
    n = len(keys)

    def f(q, norm, *cache):
        segments = list(zip(cache[:n], cache[n:], strict=True))
        return memory_xattn(q, segments, norm_weight=norm, q_rope=rope)

    return torch.autograd.gradcheck(f, (q, norm, *keys, *values))


SMALL = [((1, 2, (3,), 2, 6), False), ((1, 2, (3, 1), 2, 6), True)]


@pytest.mark.parametrize(("shape", "with_rope"), SMALL, ids=["one segment", "two segments and positions"])
def test_gradients_of_xattn_reference(shape, with_rope):
    assert gradients_of_xattn(shape, with_rope)


@pytest.mark.parametrize(("shape", "with_rope"), SMALL, ids=["one segment", "two segments and positions"])
def test_gradients_of_xattn_op(shape, with_rope, through_the_op):
    assert gradients_of_xattn(shape, with_rope)


def test_gradients_of_gate_reference():
    assert torch.autograd.gradcheck(gate_blend, make_gate(1, 2, 3, torch.float64, requires_grad=True))


def test_gradients_of_gate_op(through_the_op):
    assert torch.autograd.gradcheck(gate_blend, make_gate(1, 2, 3, torch.float64, requires_grad=True))


def test_op_leaves_out_gradients_nobody_wants(through_the_op):
    q, keys, values, *_ = make_xattn((1, 2, (3, 2), 2, 6))
    values[1].requires_grad_()
    memory_xattn(q, list(zip(keys, values, strict=True))).sum().backward()
    assert values[1].grad is not None
    assert all(x.grad is None for x in (q, *keys, values[0]))


@pytest.mark.parametrize("device", DEVICES)
def test_op_registration(device):
    xattn = make_xattn((1, 4, (5, 3), 2, 16), device=device)
    tables = rope_tables(2, 1, 2, 16, device)
    torch.library.opcheck(torch.ops.echo_ext.memory_xattn.default, xattn)
    torch.library.opcheck(torch.ops.echo_ext.memory_xattn.default, (*xattn[:-2], *tables))
    torch.library.opcheck(torch.ops.echo_ext.gate_blend.default, make_gate(2, 3, 8, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_break(device, through_the_op):
    def both(args, gate):
        return call_xattn(*args), gate_blend(*gate)

    inputs = make_xattn((1, 4, (5, 3), 2, 16), device=device), make_gate(2, 3, 8, device=device)
    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs)
        for x, y in zip(compiled, both(*inputs), strict=True):
            assert torch.equal(x, y)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(1, 4, 32)}, r"q must be \(B, Tq, H, d\), got \(1, 4, 32\)"),
        ({"segments": []}, "1 to 3 pairs of keys and values, got 0"),
        ({"segments": [(zeros(1, 5, 2, 16), zeros(1, 5, 2, 16))] * 4}, "1 to 3 pairs of keys and values, got 4"),
        ({"segments": [(zeros(2, 5, 2, 16), zeros(2, 5, 2, 16))]}, r"must be \(1, Tk, 2, 16\) .* got \(2, 5, 2, 16\)"),
        ({"segments": [(zeros(1, 0, 2, 16), zeros(1, 0, 2, 16))]}, "segment 0 is empty"),
        ({"segments": [(zeros(1, 5, 2, 16), zeros(1, 4, 2, 16))]}, r"values .* \(1, 4, 2, 16\), its keys \(1, 5, 2"),
        (
            {"segments": [(zeros(1, 5, 2, 16), zeros(1, 5, 2, 16, dtype=torch.float16))]},
            "values of segment 0 are torch.float16 on cpu, q is torch.float32",
        ),
        ({"norm_weight": zeros(16)}, r"norm_weight must be \(32,\) for 2 heads of 16, got \(16,\)"),
        ({"q_rope": rope_tables(3, 1, 1, 16)}, "got 4 tokens, the tables describe 3 frames of 1"),
        ({"norm_weight": zeros(32).to("meta")}, "norm_weight is on meta, q is on cpu"),
        ({"q_rope": rope_tables(4, 1, 1, 16, "meta")}, "frame table of q_rope is on meta, q is on cpu"),
        ({"backend": "cuda"}, "backend must be 'auto', 'kernel' or 'reference', got 'cuda'"),
    ],
)
def test_xattn_rejects(change, message):
    args = {"q": zeros(1, 4, 2, 16), "segments": [(zeros(1, 5, 2, 16), zeros(1, 5, 2, 16))], **change}
    with pytest.raises(ValueError, match=message):
        memory_xattn(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": zeros(3, 8)}, r"state must be \(B, T, D\), got \(3, 8\)"),
        ({"proposal": zeros(2, 4, 8)}, r"proposal must be \(2, 3, 8\) .* got \(2, 4, 8\)"),
        ({"weight": zeros(8, 8)}, r"weight must be \(8, 16\) .* got \(8, 8\)"),
        ({"bias": zeros(4)}, r"bias must be \(8,\) .* got \(4,\)"),
        ({"proposal": zeros(2, 3, 8, dtype=torch.float16)}, "proposal is torch.float16, state is torch.float32"),
        ({"bias": zeros(8, dtype=torch.float16)}, "bias is torch.float16, weight is torch.float32"),
    ],
)
def test_gate_rejects(change, message):
    args = {"state": zeros(2, 3, 8), "proposal": zeros(2, 3, 8), "weight": zeros(8, 16), "bias": zeros(8), **change}
    with pytest.raises(ValueError, match=message):
        gate_blend(**args)


def test_kernel_asked_for_by_name_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="memory_xattn: kernel can't run: q is on cpu"):
        call_xattn(*make_xattn((1, 4, (5,), 2, 16)), backend="kernel")
    with pytest.raises(RuntimeError, match="gate_blend: kernel can't run: state is on cpu"):
        gate_blend(*make_gate(2, 3, 8), backend="kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernels_run_on_this_device(dtype):
    args = make_xattn(SHAPES[2], dtype, "cuda", strided=True)
    out = call_xattn(*args, backend="kernel")
    assert_no_worse_than(out, memory_xattn_ref(*args), memory_xattn_ref(*in_float64(args)))
    args = make_gate(2, 7, 48, dtype, "cuda")
    out = gate_blend(*args, backend="kernel")
    assert_no_worse_than(out, gate_blend_ref(*args), gate_blend_ref(*in_float64(args)))


@pytest.mark.gpu
def test_graph_replay_sees_new_inputs():
    xattn, gate = make_xattn((1, 4, (5, 3), 2, 64), torch.bfloat16, "cuda"), make_gate(1, 4, 16, device="cuda")

    def both():
        return call_xattn(*xattn), gate_blend(*gate)

    with torch.no_grad():
        both()  # the first call loads modules; capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = both()
        for x in (xattn[0], *xattn[1], *xattn[2], *gate):
            x.normal_()
        graph.replay()
        for x, y in zip(out, both(), strict=True):
            assert torch.equal(x, y)


def make_write(groups, B=2, T=4, D=24, heads=2, layers=2):
    """State, segments, layers and gates of a write in float64, with fan-in scaled weights."""

    def linear(n_out, n_in):
        return torch.randn(n_out, n_in, dtype=torch.float64) * n_in**-0.5, torch.randn(n_out, dtype=torch.float64)

    def norm():
        return 1 + 0.1 * torch.randn(D, dtype=torch.float64)

    def layer():
        return WriteLayer(norm(), *linear(D, D), norm(), *linear(D, D), norm(), *linear(4 * D, D), *linear(D, 4 * D))

    def gate():
        return WriteGate(*linear(D, D), *linear(D, D), norm(), *linear(D, 2 * D))

    def cache(length):
        return torch.randn(B, length, heads, D // heads, dtype=torch.float64)

    state = torch.randn(groups, B, T, D, dtype=torch.float64)
    segments = [(cache(3), cache(3)), (cache(6), cache(6))]
    return state, segments, [layer() for _ in range(layers)], [gate() for _ in range(groups)]


def plain_write(state, segments, layers, gates, heads, post_norm=None):
    """The same write for one group, spelt out with modules and concatenations."""
    D = state.shape[-1]
    k, v = (torch.cat([pair[i] for pair in segments], dim=1).transpose(1, 2) for i in (0, 1))

    def rms(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight

    x = state
    for layer in layers:
        q = rms(rms(x, layer.norm1) @ layer.q_weight.T + layer.q_bias, layer.norm_q)
        q = q.view(*q.shape[:2], heads, D // heads).transpose(1, 2)
        read = ((q @ k.mT) / (D // heads) ** 0.5).softmax(-1) @ v
        x = x + read.transpose(1, 2).flatten(2) @ layer.o_weight.T + layer.o_bias
        hidden = nn.GELU("tanh")(rms(x, layer.norm2) @ layer.up_weight.T + layer.up_bias)
        x = x + hidden @ layer.down_weight.T + layer.down_bias
    if gates is not None:
        (gate,) = gates
        hidden = nn.GELU("tanh")(x @ gate.in_weight.T + gate.in_bias)
        proposal = rms(hidden @ gate.out_weight.T + gate.out_bias, gate.norm)
        g = torch.sigmoid(torch.cat([state, proposal], -1) @ gate.gate_weight.T + gate.gate_bias)
        x = g * state + (1 - g) * proposal
    return x if post_norm is None else rms(x, post_norm)


@pytest.mark.parametrize("option", ["gate", "residual", "post_norm"])
@pytest.mark.parametrize("groups", [1, 3])
def test_write_matches_the_plain_one_group_by_group(groups, option):
    state, segments, layers, gates = make_write(groups)
    gates = None if option == "residual" else gates
    post_norm = 1 + 0.1 * torch.randn(24, dtype=torch.float64) if option == "post_norm" else None
    before = state.clone()
    out = memory_write(state, segments, layers, gates, heads=2, post_norm=post_norm)
    assert torch.equal(state, before)
    for g in range(groups):
        expected = plain_write(state[g], segments, layers, gates and gates[g : g + 1], 2, post_norm)
        assert_no_worse_than(out[g], expected, expected)


def test_gradient_through_three_writes_matches_the_plain_one():
    state, segments, layers, gates = make_write(1)
    leaves = [state, *segments[0], *segments[1], *(x for part in (*layers, *gates) for x in part)]
    for x in leaves:
        x.requires_grad_()
    actual, expected = state, state[0]
    for _ in range(3):
        actual = memory_write(actual, segments, layers, gates, heads=2)
        expected = plain_write(expected, segments, layers, gates, 2)
    direction = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, leaves, at) for out, at in ((actual, direction[None]), (expected, direction))]
    for x, y in zip(*grads, strict=True):
        assert_no_worse_than(x, y, y)


@pytest.mark.parametrize("groups", [1, 2])
def test_write_with_positions_equals_rotating_the_keys_first(groups):
    state, segments, layers, gates = make_write(groups, T=6)
    q_rope = rope_tables(2, 1, 3, 12)
    k_rope = [rope_tables(1, 1, 3, 12), rope_tables(2, 1, 3, 12)]
    out = memory_write(state, segments, layers, gates, heads=2, q_rope=q_rope, k_rope=k_rope)
    rotated = [(rope_rotate(k, *tables), v) for (k, v), tables in zip(segments, k_rope, strict=True)]
    for g in range(groups):
        alone = memory_write(state[g : g + 1], rotated, layers, gates[g : g + 1], heads=2, q_rope=q_rope)
        assert_no_worse_than(out[g], alone[0], alone[0])
    assert not torch.allclose(out, memory_write(state, segments, layers, gates, heads=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": zeros(2, 4, 24)}, r"state must be \(G, B, T, D\), got \(2, 4, 24\)"),
        ({"heads": 5}, "state width 24 is no multiple of 5 heads"),
        ({"segments": []}, "segments is empty"),
        ({"gates": []}, "state has 1 groups, gates has 0"),
        ({"k_rope": [rope_tables(1, 1, 3, 12)]}, "k_rope has 1 pairs of tables for 2 segments"),
    ],
)
def test_write_rejects(change, message):
    state, segments, layers, gates = make_write(1)
    args = {"state": state, "segments": segments, "layers": layers, "gates": gates, "heads": 2, **change}
    with pytest.raises(ValueError, match=message):
        memory_write(**args)
