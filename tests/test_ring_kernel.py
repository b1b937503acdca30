"""The kernel of ring_append on the CPU: seeded shapes, wraps, layouts, what it and its binding refuse."""

import mmap
import random

import pytest
import torch
from numerics import assert_no_worse_than, assert_same_bits
from test_ring import DTYPES, EPS, copies, make, plain_norm, positional, shape_id, slots_of

from echo_ext import _native
from echo_ext.ring import ring_append, ring_append_ref
from echo_ext.rope import frame_table, rope_rotate

RINGS = ("ring_k", "ring_v", "ring_raw")


def seeded_shapes(count):
    """(B, F, T_f, slots, H, d): rings that wrap and that don't, odd numbers of tokens, heads that fill no warp."""
    draw = random.Random(4)
    shapes = [(1, 1, 1, 1, 1, 8), (1, 3, 2, 3, 12, 128), (1, 1, 1, 2, 40, 128), (1, 1, 3, 1, 9, 64)]
    while len(shapes) < count:
        frames, d = draw.randint(1, 4), draw.choice([16, 16, 64, 64, 128, 24])
        slots = draw.randint(frames, frames + 3)
        shapes.append((draw.randint(1, 3), frames, draw.randint(1, 5), slots, draw.randint(1, 6), d))
    return shapes


SHAPES = seeded_shapes(40)


def poison_rings(args):
    """Nothing of the ring is read: whatever is in it may be NaN."""
    for ring in RINGS:
        if args[ring] is not None:
            args[ring].fill_(float("nan"))
    return args


def written_by(args, **kwargs):
    """Output of the kernel, and copies of the arguments as the reference and the oracle in float64 leave them."""
    reference, wide = copies(args), copies(args, torch.float64)
    budget = ring_append_ref(*positional(reference))
    key_table = args.get("key_frame_table")
    q, k = (plain_norm(wide[x], wide[f"{x}_weight"]) for x in "qk")
    exact = {"q": rope_rotate(q, args["frame_table"], args["grid_table"]), "ring_raw": k, "ring_v": wide["v"]}
    exact["ring_k"] = rope_rotate(k, args["frame_table"] if key_table is None else key_table, args["grid_table"])
    return ring_append(**args, backend="kernel", **kwargs), budget, reference, exact


def assert_appended(args):
    before = copies(args)
    out, budget, reference, exact = written_by(args)
    assert_no_worse_than(out, budget, exact["q"])
    rings = [ring for ring in RINGS if args[ring] is not None]
    for ring in rings:
        assert_no_worse_than(*(slots_of(x, x[ring]) for x in (args, reference)), exact[ring])
    assert_same_bits(args["ring_v"], reference["ring_v"])
    tokens, slots = args["grid_table"].shape[0], args["slots"].expand(args["q"].shape[0], -1).tolist()
    for ring in rings:  # slots of other frames
        for b, own in enumerate(slots):
            others = [s for s in range(args[ring].shape[1] // tokens) if s not in own]
            assert_same_bits(*(x[ring][b].unflatten(0, (-1, tokens))[others] for x in (args, before)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: shape_id(SHAPES[i]))
def test_kernel_matches_norm_and_rotation_in_float64(index, dtype, emulated):
    shape = SHAPES[index]
    rows = 1 if index % 3 else shape[0]
    args = make(shape, dtype, strided=index % 2, rows=rows, raw=index % 4 != 0, norm=index % 5 != 0)
    if index % 6 == 0:
        args["key_frame_table"] = frame_table(torch.arange(shape[1]), shape[5])
    assert_appended(poison_rings(args))
    assert emulated.counters().launches == 1


@pytest.mark.sanitizers
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_under_the_sanitizers(dtype, emulated):
    assert_appended(poison_rings(make((2, 3, 2, 4, 5, 64), dtype, strided=True, rows=2)))


def test_kernel_takes_heads_before_tokens(emulated):
    args = make((2, 2, 3, 3, 4, 16))
    for name in ("q", "k", "v", *RINGS):
        args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_appended(args)


def test_kernel_takes_slices_of_a_fused_projection_and_a_ring_behind_a_sink(emulated):
    args = make((1, 2, 3, 3, 4, 16), torch.bfloat16)
    fused = torch.cat([args[x] for x in "qkv"], dim=2)
    args |= dict(zip("qkv", fused.split(4, dim=2), strict=True))
    buffers = {ring: torch.full((1, 15, 4, 16), float("nan"), dtype=torch.bfloat16) for ring in RINGS}
    assert_appended(args | {ring: x[:, 6:] for ring, x in buffers.items()})
    assert all(x[:, :6].isnan().all() for x in buffers.values())


def test_without_a_norm_keys_and_values_move_bit_for_bit(emulated):
    args = make((2, 3, 2, 4, 3, 16), torch.bfloat16, norm=False)
    args["v"].view(torch.int16)[0, 0, 0, :4] = torch.tensor([0x7FC1, -1, -32768, 1], dtype=torch.int16)  # NaN, -0, tiny
    ring_append(**args, backend="kernel")
    assert_same_bits(slots_of(args, args["ring_v"]), args["v"])
    assert_same_bits(slots_of(args, args["ring_raw"]), args["k"])


def test_rows_of_zeros_and_huge_rows_stay_finite(emulated):
    args = make((1, 1, 3, 2, 3, 16))
    args["k"][:, 0], args["k"][:, 1] = 0.0, 1e18
    ring_append(**args, backend="kernel")
    got = slots_of(args, args["ring_raw"])
    assert torch.equal(got[:, 0], torch.zeros_like(got[:, 0]))
    expected = args["k_weight"].view(1, 3, 16)
    assert_no_worse_than(got[:, 1], expected, expected)


@pytest.mark.parametrize("slot", [-1, 3, 2**40, -(2**40)])
def test_a_frame_of_a_slot_outside_the_ring_is_not_written(slot, emulated):
    args = make((1, 3, 2, 3, 3, 16))
    expected, before, lost = copies(args), copies(args), args["slots"][0, 1].item()
    out = ring_append(**expected, backend="kernel")
    args["slots"][0, 1] = slot
    assert_same_bits(ring_append(**args, backend="kernel"), out)
    for ring in RINGS:
        for s in range(3):
            source = before if s == lost else expected
            assert_same_bits(args[ring][:, 2 * s : 2 * s + 2], source[ring][:, 2 * s : 2 * s + 2])


def test_no_tokens_and_no_streams(emulated):
    args = make((2, 1, 3, 2, 3, 16))
    none = args | {x: args[x][:0] for x in ("q", "k", "v", *RINGS)}
    assert ring_append(**none, backend="kernel").shape == (0, 3, 3, 16)
    before = copies(args)
    empty = {x: args[x][:, :0] for x in "qkv"} | {"frame_table": args["frame_table"][:, :0]}
    assert ring_append(**args | empty | {"slots": args["slots"][:, :0]}, backend="kernel").shape == (2, 0, 3, 16)
    assert_same_bits(args["ring_k"], before["ring_k"])


def test_rings_beyond_32_bit_offsets(emulated):
    """Streams 2^31 elements apart in one buffer, of which only the touched pages exist."""
    emulated.configure(race=False)  # which would note who wrote each element
    args = make((2, 1, 2, 1, 2, 16), torch.bfloat16, raw=False)
    memory = mmap.mmap(-1, 2 * (2**31 + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(memory, dtype=torch.bfloat16)
    args["ring_k"] = buffer.as_strided((2, 2, 2, 16), (2**31, 32, 16, 1))
    assert_appended(args)


def test_kernel_op_registration(emulated):
    args = make((2, 3, 2, 4, 3, 16), torch.bfloat16, strided=True)
    torch.library.opcheck(torch.ops.echo_ext.ring_append.default, positional(args))
    assert emulated.counters().launches > 0


def test_kernel_compiles_without_graph_break_and_keeps_the_writes(emulated):
    args = make((2, 3, 2, 4, 3, 16))
    expected = copies(args)
    compiled = torch.compile(lambda a: ring_append(**a, backend="kernel"), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(args), ring_append(**expected, backend="kernel"))
    assert_same_bits([args[ring] for ring in RINGS], [expected[ring] for ring in RINGS])
    assert emulated.counters().launches == 2


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": zeros(2, 6, 16, 3).mT}, "the last dim of q is strided"),
        ({"v": zeros(2, 6, 3, 18)[..., :16]}, "rows of v don't start at multiples of 16 bytes"),
        ({"ring_raw": zeros(2 * 8 * 3 * 16 + 1)[1:].view(2, 8, 3, 16)}, "rows of ring_raw don't start at multiples"),
        ({"q_weight": zeros(48).half()}, "q_weight is torch.float16, q is torch.float32"),
        ({"k_weight": zeros(96)[::2]}, "the last dim of k_weight is strided"),
        ({"frame_table": zeros(1, 3, 4, 2, dtype=torch.float64)}, "frame_table is torch.float64"),
        ({"grid_table": zeros(2, 4, 3)[..., :2]}, "grid_table is not dense in its last two dims"),
    ],
)
def test_what_the_kernel_cannot_take_is_appended_by_pytorch(change, reason, emulated):
    args = make((2, 3, 2, 4, 3, 16)) | change
    with pytest.raises(RuntimeError, match=f"ring_append: kernel can't run: {reason}"):
        ring_append(**args, backend="kernel")
    ring_append(**args)
    assert emulated.counters().launches == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 1, 1, 2, 6), torch.float32, "head dim 6 is no multiple of 4"),
        ((1, 1, 1, 1, 2, 12), torch.float16, "head dim 12 is no multiple of 8"),
        ((1, 1, 1, 1, 2, 16), torch.float64, "dtype torch.float64 is not built"),
        ((1, 1, 1, 1, 97, 128), torch.bfloat16, "97 heads of 128 torch.bfloat16 are wider than 24576 bytes"),
    ],
)
def test_shapes_and_dtypes_the_kernel_cannot_take(shape, dtype, reason, emulated):
    with pytest.raises(RuntimeError, match=reason):
        ring_append(**make(shape, dtype), backend="kernel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(6, 3, 16)}, r"q must be \(-1, -1, -1, -1\)"),
        ({"k": zeros(2, 5, 3, 16)}, r"k must be \(2, 6, 3, 16\), -1 for any size, got \(2, 5, 3, 16\)"),
        ({"k": zeros(2, 6, 3, 16).half()}, "k must be float32, got float16"),
        ({"v": zeros(2, 6, 16, 3).mT}, "v must have a contiguous last dim"),
        ({"v": zeros(2, 6, 3, 18)[..., :16]}, "v must have rows that fill and start at multiples of 16 bytes"),
        ({"q": zeros(2 * 6 * 48 + 1)[1:].view(2, 6, 3, 16)}, "q must have rows that fill and start at multiples"),
        ({"out": zeros(2, 6, 3, 32)[..., :16]}, "out must be contiguous"),
        ({"q_weight": zeros(16)}, r"q_weight must be \(48,\)"),
        ({"k_weight": zeros(48).bfloat16()}, "k_weight must be float32, got bfloat16"),
        ({"frame_table": zeros(3, 3, 4, 2)}, "frame_table has 3 rows for a batch of 2"),
        ({"frame_table": zeros(1, 2, 4, 2)}, "q has 6 tokens, the tables describe 2 frames of 2"),
        ({"key_frame_table": zeros(1, 3, 5, 2)}, r"q has d=16, the tables describe 5 \+ 4 pairs"),
        ({"key_frame_table": zeros(1, 3, 4, 2).half()}, "key_frame_table must be float32, got float16"),
        ({"slots": torch.zeros(1, 2, dtype=torch.int64)}, r"slots must be \(-1, 3\)"),
        ({"slots": torch.zeros(3, 3, dtype=torch.int64)}, "slots has 3 rows for a batch of 2"),
        ({"slots": zeros(1, 3)}, "slots must be int64, got float32"),
        (
            {"ring_k": zeros(2, 7, 3, 16), "ring_v": zeros(2, 7, 3, 16), "ring_raw": None},
            "a ring of 7 tokens is no whole",
        ),
        ({"ring_v": zeros(2, 6, 3, 16)}, r"ring_v must be \(2, 8, 3, 16\)"),
        ({"ring_raw": zeros(1, 8, 3, 16)}, r"ring_raw must be \(2, 8, 3, 16\)"),
        ({"ring_raw": zeros(2, 8, 3, 16).half()}, "ring_raw must be float32, got float16"),
    ],
)
def test_binding_rejects_what_python_missed(change, message, emulated):
    args = {"key_frame_table": None, **make((2, 3, 2, 4, 3, 16)), "out": zeros(2, 6, 3, 16), **change}
    views = {name: None if x is None else _native.view(x) for name, x in args.items()}
    with pytest.raises(ValueError, match=f"echo_ext: {message}"):
        _native.module().ring_append_fwd(**views, eps=EPS, stream=(0, 0))
    assert emulated.counters().launches == 0
