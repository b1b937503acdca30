"""ring_append and ring_evict: float64 oracle, bitwise moves, a deque as the model, contract, torch.compile."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_no_worse_than, assert_same_bits

from echo_ext import _native
from echo_ext.ring import Evicted, ring_append, ring_append_ref, ring_evict
from echo_ext.rope import frame_table, grid_table, rope_rotate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
EPS = 1e-6
# (B, F, T_f, slots in the ring, H, d): one token; a wrapped block; a full ring; the official heads scaled down.
SHAPES = [(1, 1, 1, 1, 1, 6), (2, 3, 5, 4, 3, 16), (1, 2, 7, 2, 1, 64), (1, 3, 6, 12, 12, 128)]
NAMES = [
    "q_weight",
    "k_weight",
    "frame_table",
    "key_frame_table",
    "grid_table",
    "slots",
    "ring_k",
    "ring_v",
    "ring_raw",
]


def shape_id(shape):
    return "B{}-F{}-T{}-S{}-H{}-d{}".format(*shape)


def make(shape, dtype=torch.float32, device="cpu", *, strided=False, rows=1, raw=True, norm=True):
    """Keyword arguments of the op; frames from id 7 on wrap past the last slot."""
    B, frames, tokens, slots, H, d = shape

    def draw(length):
        # Strided tensors are slices of a wider buffer, as a fused projection's are; the rest is poison.
        wide = torch.full((B, length + strided, H, d + 16 * strided), float("nan"), device=device, dtype=dtype)
        wide[:, :length, :, :d] = torch.randn(B, length, H, d, device=device)
        return wide[:, :length, :, :d]

    def weight():
        return (1 + 0.1 * torch.randn(H * d, device=device)).to(dtype) if norm else None

    ids = torch.arange(7, 7 + frames)[None] + 5 * torch.arange(rows)[:, None]
    return {
        "q": draw(frames * tokens),
        "k": draw(frames * tokens),
        "v": draw(frames * tokens),
        "q_weight": weight(),
        "k_weight": weight(),
        "frame_table": frame_table(ids, d, device=device),
        "grid_table": grid_table([0] * tokens, range(tokens), d, device=device),
        "slots": (ids % slots).to(device),
        "ring_k": draw(slots * tokens),
        "ring_v": draw(slots * tokens),
        "ring_raw": draw(slots * tokens) if raw else None,
    }


def positional(args):
    """The op's own argument order."""
    return *(args[x] for x in "qkv"), *(args.get(name) for name in NAMES), EPS


def copies(args, dtype=None):
    """The same arguments with rings and inputs of their own, tables apart in ``dtype`` if given."""
    return {
        name: x
        if x is None or name in ("slots", "frame_table", "grid_table", "key_frame_table")
        else x.to(dtype or x.dtype).clone()
        for name, x in args.items()
    }


def slots_of(args, ring):
    """``ring``'s tokens at the slots of the call, ``(B, F * T_f, H, d)``."""
    tokens, slots = args["grid_table"].shape[0], args["slots"].expand(ring.shape[0], -1)
    rows = [ring[b].unflatten(0, (-1, tokens))[slots[b]].flatten(0, 1) for b in range(ring.shape[0])]
    return torch.stack(rows)


def plain_norm(x, weight):
    """RMS norm over all heads together, spelt out."""
    if weight is None:
        return x
    flat = x.flatten(-2)
    return (flat * (flat.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight).view(x.shape)


@pytest.fixture
def through_the_op(monkeypatch):
    """Send CPU tensors down the kernel's path (op, fake), ending in the CPU implementation."""
    monkeypatch.setattr("echo_ext.ring._why_not_kernel", lambda q: None)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_norm_and_rotation_in_float64(device, shape, dtype, strided):
    args = make(shape, dtype, device, strided=strided)
    wide, reference = copies(args, torch.float64), copies(args)
    q, k = (plain_norm(wide[x], wide[f"{x}_weight"]) for x in "qk")
    tables = args["frame_table"], args["grid_table"]
    exact = {"q": rope_rotate(q, *tables), "ring_k": rope_rotate(k, *tables), "ring_raw": k}
    expected = ring_append_ref(*positional(reference))
    out = ring_append(**args)
    assert out.is_contiguous()
    assert_no_worse_than(out, expected, exact["q"])
    assert_no_worse_than(out, exact["q"].to(dtype), exact["q"])
    for ring in ("ring_k", "ring_raw"):
        written, budget = (slots_of(x, x[ring]) for x in (args, reference))
        assert_no_worse_than(written, budget, exact[ring])
        assert_no_worse_than(written, exact[ring].to(dtype), exact[ring])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 2], ids=["shared slots", "slots per stream"])
@pytest.mark.parametrize("device", DEVICES)
def test_values_move_bit_for_bit_and_other_slots_stay(device, rows, dtype):
    args = make((2, 3, 5, 7, 3, 16), dtype, device, strided=True, rows=rows, norm=False)
    before = copies(args)
    ring_append(**args)
    for ring, source in (("ring_v", "v"), ("ring_raw", "k")):
        assert_same_bits(slots_of(args, args[ring]), args[source])
    for ring in ("ring_k", "ring_v", "ring_raw"):
        for b in range(2):
            written = args["slots"].expand(2, -1)[b].tolist()
            untouched = [s for s in range(7) if s not in written]
            old, new = (x[ring][b].unflatten(0, (7, 5))[untouched] for x in (before, args))
            assert_same_bits(new, old)


def test_streams_with_their_own_ids_and_slots_equal_single_streams():
    args = make(SHAPES[1], rows=2)
    single = [
        {n: x if n in ("grid_table", "q_weight", "k_weight") else x[b : b + 1].clone() for n, x in args.items()}
        for b in (0, 1)
    ]
    out = ring_append(**args)
    for b, alone in enumerate(single):
        expected = ring_append(**alone)
        assert_no_worse_than(out[b : b + 1], expected, expected)
        for ring in ("ring_k", "ring_v", "ring_raw"):
            assert_no_worse_than(args[ring][b : b + 1], alone[ring], alone[ring])


def test_keys_may_be_rotated_by_other_ids_than_queries():
    args = make(SHAPES[1])
    plain = copies(args)
    key_table = frame_table([0, 1, 2], 16)
    out = ring_append(**args, key_frame_table=key_table)
    assert_same_bits(out, ring_append(**plain))
    ring_append(**(plain | {"frame_table": key_table}))
    assert_same_bits([args["ring_k"], args["ring_raw"]], [plain["ring_k"], plain["ring_raw"]])


def test_appending_again_at_the_same_slots_overwrites_only_them():
    args = make((1, 3, 2, 7, 2, 16))
    first = copies(args)
    ring_append(**first)
    again = first | {x: torch.randn_like(args[x]) for x in "qkv"}
    ring_append(**again)
    expected = args | {x: again[x] for x in "qkv"}
    ring_append(**expected)
    for ring in ("ring_k", "ring_v", "ring_raw"):
        assert_same_bits(again[ring], expected[ring])


def test_rows_of_zeros_and_huge_rows_stay_finite():
    args = make(SHAPES[1])
    args["k"][:, :5], args["k"][:, 5:10] = 0.0, 1e18
    ring_append(**args)
    got = slots_of(args, args["ring_raw"])
    assert torch.equal(got[:, :5], torch.zeros_like(got[:, :5]))
    expected = args["k_weight"].view(1, 1, 3, 16).expand(2, 5, 3, 16)
    assert_no_worse_than(got[:, 5:10], expected, expected)


def test_spans_wrap_once():
    assert Evicted(0, 0, 9).spans() == []
    assert Evicted(6, 3, 9).spans() == [(6, 9)]
    assert Evicted(7, 3, 9).spans() == [(7, 9), (0, 1)]


@settings(deadline=None)
@given(slots=st.integers(1, 9), first=st.integers(0, 8), count=st.integers(0, 9), tokens=st.integers(1, 3))
def test_evicted_frames_are_views_oldest_first(slots, first, count, tokens):
    first, count = first % slots, min(count, slots)
    buffer = torch.arange(2 * (slots + 2) * tokens).view(2, -1, 1, 1).expand(-1, -1, 2, 4).clone()
    k = buffer[:, 2 * tokens :]  # a ring behind two sink frames
    v = -k
    pairs = ring_evict(k, v, first, count, tokens)
    assert len(pairs) == (count > 0) + (first + count > slots)
    for ring, views in ((k, [k for k, _ in pairs]), (v, [v for _, v in pairs])):
        assert all(x.untyped_storage().data_ptr() == ring.untyped_storage().data_ptr() for x in views)
        expected = [ring.unflatten(1, (-1, tokens))[:, (first + i) % slots] for i in range(count)]
        assert torch.equal(torch.cat(views, 1), torch.cat(expected, 1)) if count else not views


@settings(deadline=None)
@given(local=st.integers(1, 9), data=st.data())
def test_ring_holds_what_a_deque_holds(local, data):
    """Frame f goes to slot f % local; blocks of any size up to the ring's leave what a deque would."""
    model, frame = deque(maxlen=local), 0
    ring = torch.full((1, local * 2, 1, 6), float("nan"))
    raw, values = ring.clone(), ring.clone()
    for size in data.draw(st.lists(st.integers(1, local), min_size=1, max_size=8)):
        frames = range(frame, frame + size)
        count = max(0, len(model) + size - local)
        leaving = [
            f
            for k, _ in ring_evict(raw, values, (frame - len(model)) % local, count, 2)
            for f in k[0, ::2, 0, 0].tolist()
        ]
        assert leaving == list(model)[:count]
        x = (
            torch.tensor([f for f in frames for _ in range(2)], dtype=torch.float32)
            .view(1, -1, 1, 1)
            .expand(-1, -1, 1, 6)
        )
        ring_append(
            x,
            x,
            x,
            q_weight=None,
            k_weight=None,
            frame_table=frame_table(list(frames), 6),
            grid_table=grid_table([0, 0], [0, 1], 6),
            slots=torch.tensor([[f % local for f in frames]]),
            ring_k=ring,
            ring_v=values,
            ring_raw=raw,
        )
        model.extend(frames)
        frame += size
        for held in (raw, values):
            assert {f: held[0, 2 * (f % local), 0, 0].item() for f in model} == {f: f for f in model}
        assert values.isnan().sum() == 12 * (local - len(model))


@pytest.mark.parametrize("device", DEVICES)
def test_op_registration(device):
    for args in (
        make(SHAPES[1], device=device, strided=True),
        make(SHAPES[1], torch.bfloat16, device, raw=False, norm=False),
    ):
        args["key_frame_table"] = args["frame_table"].clone() if args["ring_raw"] is None else None
        torch.library.opcheck(torch.ops.echo_ext.ring_append.default, positional(args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["op", "fallback"])
def test_compiles_without_graph_break_and_keeps_the_writes(device, path, request):
    if path == "op":
        request.getfixturevalue("through_the_op")
    args = make(SHAPES[1], device=device)
    expected = copies(args)
    out = torch.compile(lambda a: ring_append(**a), fullgraph=True, backend="aot_eager")(args)
    assert_same_bits(out, ring_append(**expected))
    for ring in ("ring_k", "ring_v", "ring_raw"):
        assert_same_bits(args[ring], expected[ring])


def test_refuses_to_drop_a_gradient():
    args = make(SHAPES[1])
    args["v"].requires_grad_()
    with pytest.raises(RuntimeError, match="writes in place and has no gradient; train with the functional cache"):
        ring_append(**args)
    with torch.no_grad():
        ring_append(**args)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 15, 48)}, r"q and ring_k must be \(B, T, H, d\), got \(2, 15, 48\)"),
        ({"k": zeros(2, 14, 3, 16)}, r"k must be \(2, 15, 3, 16\) to match q .* got \(2, 14, 3, 16\)"),
        ({"v": zeros(2, 15, 3, 16, dtype=torch.float16)}, "v is torch.float16 on cpu, q is torch.float32 on cpu"),
        ({"ring_k": zeros(2, 19, 3, 16)}, "a ring of 19 tokens is no whole number of 5-token frames"),
        ({"ring_v": zeros(2, 15, 3, 16)}, r"ring_v must be \(2, 20, 3, 16\) .* got \(2, 15, 3, 16\)"),
        ({"ring_raw": zeros(1, 20, 3, 16)}, r"ring_raw must be \(2, 20, 3, 16\) .* got \(1, 20, 3, 16\)"),
        ({"ring_k": zeros(2, 20, 3, 16).to("meta")}, "ring_k is torch.float32 on meta, q is torch.float32 on cpu"),
        (
            {"slots": torch.zeros(1, 2, dtype=torch.int64)},
            r"slots must be int64 \(1 or 2, 3\), got torch.int64 \(1, 2\)",
        ),
        ({"slots": torch.zeros(1, 3, dtype=torch.int32)}, r"slots must be int64 .* got torch.int32"),
        ({"slots": torch.zeros(1, 3, dtype=torch.int64, device="meta")}, "slots is on meta, q is on cpu"),
        ({"frame_table": zeros(1, 2, 4, 2)}, "got 15 tokens, the tables describe 2 frames of 5"),
        ({"key_frame_table": zeros(1, 3, 5, 2)}, r"frame_table must be \(B, F, 4, 2\) for d=16, got \(1, 3, 5, 2\)"),
        ({"grid_table": zeros(5, 4, 2).to("meta")}, "grid_table is on meta, q is on cpu"),
        ({"k_weight": zeros(16)}, r"k_weight must be \(48,\) for 3 heads of 16, got \(16,\)"),
        ({"q_weight": zeros(48).to("meta")}, "q_weight is on meta, q is on cpu"),
        ({"backend": "cuda"}, "backend must be 'auto', 'kernel' or 'reference', got 'cuda'"),
    ],
)
def test_append_rejects(change, message):
    args = make(SHAPES[1])
    before = copies(args)
    with pytest.raises(ValueError, match=message):
        ring_append(**{**args, **change})
    for ring in ("ring_k", "ring_v", "ring_raw"):
        assert_same_bits(args[ring], before[ring])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (zeros(1, 6, 2, 6), zeros(1, 5, 2, 6), 0, 1, 2),
            r"ring_k \(1, 6, 2, 6\) and ring_v \(1, 5, 2, 6\) must be one",
        ),
        ((zeros(1, 7, 2, 6), zeros(1, 7, 2, 6), 0, 1, 2), "a ring of 7 tokens is no whole number of 2-token frames"),
        ((zeros(1, 6, 2, 6), zeros(1, 6, 2, 6), 3, 1, 2), "can't evict 1 frames from slot 3 of a ring of 3 slots"),
        ((zeros(1, 6, 2, 6), zeros(1, 6, 2, 6), 0, 4, 2), "can't evict 4 frames from slot 0 of a ring of 3 slots"),
    ],
)
def test_evict_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        ring_evict(*arguments)


def test_kernel_asked_for_by_name_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="ring_append: kernel can't run: q is on cpu"):
        ring_append(**make(SHAPES[1]), backend="kernel")


@pytest.mark.gpu
def test_kernel_runs_or_says_that_the_build_lacks_it():
    args = make(SHAPES[3], device="cuda")
    if hasattr(_native.module(), "ring_append_fwd"):
        assert ring_append(**args, backend="kernel").is_cuda
    else:
        with pytest.raises(RuntimeError, match="this build has no ring_append kernel"):
            ring_append(**args, backend="kernel")


@pytest.mark.gpu
def test_graph_replay_sees_new_inputs_and_slots():
    args = make(SHAPES[3], torch.bfloat16, "cuda")
    ring_append(**args)  # the first call loads modules; capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ring_append(**args)
    for x in "qkv":
        args[x].normal_()
    args["slots"].copy_(torch.tensor([[11, 0, 1]]))
    expected = copies(args)
    graph.replay()
    assert_same_bits(out, ring_append(**expected))
    assert_same_bits(args["ring_v"], expected["ring_v"])
