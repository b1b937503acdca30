"""The memory's kernels on the CPU: queries, attention on evicted frames in their ring, whole writes."""

import random

import pytest
import torch
from numerics import assert_no_worse_than
from test_memory import DTYPES, EPS, call_xattn, in_float64, make_write, make_xattn, rope_tables, shape_id, zeros

from echo_ext import _native
from echo_ext.memory import memory_write, memory_xattn, memory_xattn_ref
from echo_ext.ring import ring_evict


def seeded_shapes(count):
    """(B, Tq, Tk a segment, H, d): up to three segments, of one key, of a whole step of keys and past it."""
    draw = random.Random(6)
    shapes = [(1, 1, (1,), 1, 16), (1, 2, (64, 65, 1), 1, 64), (1, 130, (7,), 1, 16), (1, 2, (33,), 2, 128)]
    while len(shapes) < count:
        lengths = tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 3)))
        heads, d = draw.choice([(1, 16), (3, 16), (5, 16), (1, 64), (2, 64), (1, 128)])
        shapes.append((draw.randint(1, 2), draw.randint(1, 40), lengths, heads, d))
    return shapes


SHAPES = seeded_shapes(40)


def make(shape, dtype=torch.float32, *, strided=False, rope=False, norm=True):
    """Positional arguments of the op."""
    q, keys, values, weight, eps, scale, *_ = make_xattn(shape, dtype, strided=strided)
    frames = 2 if shape[1] % 2 == 0 else 1
    tables = rope_tables(frames, 1, shape[1] // frames, shape[4]) if rope else (None, None)
    return q, keys, values, weight if norm else None, eps, scale, *tables


def exact_read(args):
    """The reference in float64, but for tables, which stay what they are."""
    return memory_xattn_ref(*in_float64(args[:6]), *args[6:])


def assert_reads(args):
    out = call_xattn(*args, backend="kernel")
    assert_no_worse_than(out, memory_xattn_ref(*args), exact_read(args))
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: shape_id(SHAPES[i]))
def test_kernel_matches_reference(index, dtype, emulated):
    assert_reads(make(SHAPES[index], dtype, strided=index % 2, rope=index % 3 == 0, norm=index % 4 != 0))
    assert emulated.counters().launches > 0


@pytest.mark.sanitizers
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_under_the_sanitizers(dtype, emulated):
    assert_reads(make((2, 6, (5, 33), 3, 64), dtype, strided=True, rope=True))


@pytest.mark.parametrize("first", [0, 2, 4])
def test_evicted_frames_are_read_in_their_ring(first, emulated):
    """Three of five frames from any slot on; what the other slots and the sink hold is never read."""
    tokens, shape = 5, (2, 30, 2, 16)  # a ring of six slots behind none
    buffers = [torch.full((2, 5 + 30, 2, 16), float("nan")) for _ in "kv"]
    k, v = (x[:, 5:] for x in buffers)
    for ring in (k, v):
        frames = ring.unflatten(1, (-1, tokens))
        frames[:, [(first + i) % 6 for i in range(3)]] = torch.randn(2, 3, tokens, 2, 16)
    segments = ring_evict(k, v, first, 3, tokens)
    assert len(segments) == 1 + (first > 3)
    q, norm = torch.randn(shape[0], 9, *shape[2:]), 1 + 0.1 * torch.randn(32)
    args = (q, [k for k, _ in segments], [v for _, v in segments], norm, EPS, 16**-0.5, None, None)
    assert_reads(args)


@pytest.mark.parametrize("rows", [1, 2])
def test_queries_may_have_positions_of_their_own_a_stream(rows, emulated):
    args = make((2, 6, (5,), 3, 16), rope=True)
    frames = torch.cat([args[6], rope_tables(5, 1, 1, 16)[0][:, 3:5]])[:rows]
    assert_reads((*args[:6], frames, args[7]))


def test_norm_alone_rotation_alone_and_neither(emulated):
    for norm, rope in [(True, False), (False, True), (False, False)]:
        emulated.counters(reset=True)
        args = make((1, 4, (5,), 2, 16), rope=rope, norm=norm)
        assert_reads(args)
        alone = emulated.counters(reset=True).launches
        memory_xattn(args[0], [(args[1][0], args[2][0])], backend="kernel")
        assert alone - emulated.counters().launches == (norm or rope)


def test_scores_that_overflow_exp(emulated):
    q, keys, values, *_ = make_xattn((1, 4, (4, 2), 2, 16))
    segments = [(k * 1e3, v) for k, v in zip(keys, values, strict=True)]
    out = memory_xattn(q * 1e3, segments, backend="kernel")
    scores = torch.einsum("bihd,bjhd->bhij", q, torch.cat(keys, dim=1))
    chosen = torch.cat(values, dim=1).transpose(1, 2).gather(2, scores.argmax(-1)[..., None].expand(-1, -1, -1, 16))
    assert_no_worse_than(out, chosen.transpose(1, 2), chosen.transpose(1, 2).double())


def test_zero_queries_average_the_values(emulated):
    q, keys, values, norm, *_ = make_xattn((1, 4, (3, 5), 2, 16))
    segments = list(zip(keys, values, strict=True))
    out = memory_xattn(torch.zeros_like(q), segments, norm_weight=norm, backend="kernel")
    expected = torch.cat(values, dim=1).double().mean(dim=1, keepdim=True).expand_as(q)
    assert_no_worse_than(out, expected.float(), expected)


def test_no_queries_and_no_streams(emulated):
    q, keys, values, norm, *_ = make_xattn((2, 4, (3,), 2, 16))
    segments = [(keys[0], values[0])]
    assert memory_xattn(q[:, :0], segments, norm_weight=norm, backend="kernel").shape == (2, 0, 2, 16)
    none = [(keys[0][:0], values[0][:0])]
    assert memory_xattn(q[:0], none, norm_weight=norm, backend="kernel").shape == (0, 4, 2, 16)


def test_gradient_through_the_kernel_is_the_references(emulated):
    q, keys, values, norm, *_ = make_xattn((1, 4, (3, 5), 2, 16), requires_grad=True)
    inputs, segments = (q, norm, *keys, *values), list(zip(keys, values, strict=True))

    def grads(backend):
        out = memory_xattn(q, segments, norm_weight=norm, backend=backend)
        return torch.autograd.grad(out.square().sum(), inputs)

    for x, y in zip(grads("kernel"), grads("reference"), strict=True):
        assert_no_worse_than(x, y, y.double())


def test_kernel_op_registration_and_compilation(emulated):
    args = make((1, 4, (5, 3), 2, 16), torch.bfloat16, strided=True, rope=True)
    torch.library.opcheck(torch.ops.echo_ext.memory_xattn.default, args)
    compiled = torch.compile(lambda *a: call_xattn(*a, backend="kernel"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), call_xattn(*args, backend="kernel"))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "bf16 beside a float32 state"])
def test_a_write_by_kernels_equals_the_reference(dtype, groups, emulated):
    state, segments, layers, gates = make_write(groups, T=6, D=32)
    rope = {"q_rope": rope_tables(2, 1, 3, 16), "k_rope": [rope_tables(1, 1, 3, 16), rope_tables(2, 1, 3, 16)]}
    exact = memory_write(state, segments, layers, gates, heads=2, **rope)
    narrow = DTYPES[dtype.split()[0]]

    def cast(x, to=narrow):
        return x.to(to) if isinstance(x, torch.Tensor) else type(x)(*map(cast, x)) if hasattr(x, "_fields") else x

    state = state.to(torch.float32 if "float32" in dtype else narrow)
    segments = [(cast(k), cast(v)) for k, v in segments]
    layers, gates = [cast(x) for x in layers], [cast(x) for x in gates]
    backends = ("kernel", "auto", "reference")
    outs = [memory_write(state, segments, layers, gates, heads=2, backend=b, **rope) for b in backends]
    assert torch.equal(outs[0], outs[1])
    assert_no_worse_than(outs[0], outs[2], exact)
    # Two layers with a query kernel and an attention each, a rotation a segment, a gate a group; twice.
    assert emulated.counters().launches == 2 * (2 * 2 + 2 + groups)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm_weight": zeros(32).half()}, "norm_weight is torch.float16, q is torch.float32"),
        ({"norm_weight": zeros(64)[::2]}, "the last dim of norm_weight is strided"),
        ({"q": zeros(1, 4, 16, 2).mT}, "the last dim of q is strided"),
        ({"q": zeros(1, 4, 2, 18)[..., :16]}, "rows of q don't start at multiples of 16 bytes"),
        ({"segments": [(zeros(1, 5, 2, 18)[..., :16], zeros(1, 5, 2, 16))]}, "rows of keys of segment 0 don't start"),
        ({"segments": [(zeros(1, 5, 2, 16), zeros(1, 5, 16, 2).mT)]}, "the last dim of values of segment 0 is strided"),
        ({"q_rope": (zeros(1, 4, 4, 2).double(), zeros(1, 4, 2))}, "frame table of q_rope is torch.float64"),
        ({"q_rope": (zeros(1, 4, 4, 2), zeros(1, 4, 3)[..., :2])}, "grid table of q_rope is not dense"),
        ({"scale": -1.0}, "scale -1.0 is not above 0"),
    ],
)
def test_what_the_kernel_cannot_take_is_read_by_pytorch(change, reason, emulated):
    args = {"q": zeros(1, 4, 2, 16), "segments": [(zeros(1, 5, 2, 16), zeros(1, 5, 2, 16))]} | change
    with pytest.raises(RuntimeError, match=f"memory_xattn: kernel can't run: {reason}"):
        memory_xattn(**args, backend="kernel")
    assert memory_xattn(**args).shape == (1, 4, 2, 16)
    assert emulated.counters().launches == 0


@pytest.mark.parametrize(
    ("heads", "d", "dtype", "reason"),
    [
        (1, 32, torch.float32, "head dim 32 is not built, only 16, 64 and 128"),
        (1, 16, torch.float64, "dtype torch.float64 is not built"),
        (97, 128, torch.float16, "97 heads of 128 torch.float16 are wider than 24576 bytes"),
    ],
)
def test_shapes_and_dtypes_the_kernel_cannot_take(heads, d, dtype, reason, emulated):
    with pytest.raises(RuntimeError, match=reason):
        call_xattn(*make_xattn((1, 1, (1,), heads, d), dtype), backend="kernel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(4, 2, 16)}, r"q must be \(-1, -1, -1, -1\)"),
        ({"q": zeros(2, 4, 2, 18)[..., :16]}, "q must have rows that fill and start at multiples of 16 bytes"),
        ({"out": zeros(2, 4, 2, 8)}, r"out must be \(2, 4, 2, 16\)"),
        ({"out": zeros(2, 4, 2, 16).half()}, "out must be float32, got float16"),
        ({"out": zeros(2, 4, 2, 32)[..., :16]}, "out must be contiguous"),
        ({"norm_weight": zeros(16)}, r"norm_weight must be \(32,\)"),
        ({"norm_weight": zeros(32).half()}, "norm_weight must be float32, got float16"),
        ({"grid_table": None}, "frame_table and grid_table go together"),
        ({"frame_table": zeros(1, 3, 4, 2)}, "q has 4 tokens, the tables describe 3 frames of 2"),
        ({"frame_table": zeros(3, 2, 4, 2)}, "frame_table has 3 rows for a batch of 2"),
        ({"grid_table": zeros(2, 5, 2)}, r"q has d=16, the tables describe 4 \+ 5 pairs"),
    ],
)
def test_binding_rejects_what_python_missed(change, message, emulated):
    args = {"q": zeros(2, 4, 2, 16), "norm_weight": zeros(32), "out": zeros(2, 4, 2, 16)}
    args |= {"frame_table": zeros(1, 2, 4, 2), "grid_table": zeros(2, 4, 2)} | change
    views = {name: None if x is None else _native.view(x) for name, x in args.items()}
    with pytest.raises(ValueError, match=f"echo_ext: {message}"):
        _native.module().memory_query_fwd(**views, eps=EPS, stream=(0, 0))
    assert emulated.counters().launches == 0
