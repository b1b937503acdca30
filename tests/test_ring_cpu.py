"""The CPU kernel of ring_append: every instruction set against float64, what it writes and what it leaves alone."""

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, needs_kernels
from numerics import assert_no_worse_than, assert_same_bits
from test_ring import copies, make, plain_norm, positional, slots_of

from echo_ext import _cpu, _native
from echo_ext.ring import ring_append, ring_append_ref
from echo_ext.rope import frame_table, rope_rotate

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# (B, F, T_f, slots, H, d): one token; a wrapped block of two streams; wide heads; more tokens than one task takes.
SHAPES = [(1, 1, 1, 1, 1, 16), (2, 3, 5, 4, 3, 48), (1, 2, 7, 2, 2, 256), (1, 2, 150, 3, 6, 64)]
RINGS = ("ring_k", "ring_v", "ring_raw")


def shape_id(shape):
    return "B{}-F{}-T{}-S{}-H{}-d{}".format(*shape)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_matches_norm_and_rotation_in_float64(isa, shape, dtype, strided):
    args = make(shape, dtype, strided=strided)
    wide, reference = copies(args, torch.float64), copies(args)
    q, k = (plain_norm(wide[x], wide[f"{x}_weight"]) for x in "qk")
    tables = args["frame_table"], args["grid_table"]
    exact = {"q": rope_rotate(q, *tables), "ring_k": rope_rotate(k, *tables), "ring_raw": k}
    budget = ring_append_ref(*positional(reference))
    out = _cpu.append(*positional(args), isa=isa)
    assert out.is_contiguous()
    assert_no_worse_than(out, budget, exact["q"])
    for ring in ("ring_k", "ring_raw"):
        assert_no_worse_than(slots_of(args, args[ring]), slots_of(reference, reference[ring]), exact[ring])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 2], ids=["shared slots", "slots per stream"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_values_move_bit_for_bit_and_other_slots_stay(isa, rows, dtype):
    args = make((2, 3, 5, 7, 3, 16), dtype, strided=True, rows=rows, norm=False)
    before = copies(args)
    _cpu.append(*positional(args), isa=isa)
    for ring, source in (("ring_v", "v"), ("ring_raw", "k")):
        assert_same_bits(slots_of(args, args[ring]), args[source].contiguous())
    used = torch.zeros(2, 7, dtype=torch.bool).scatter_(1, args["slots"].expand(2, -1), True)
    for ring in RINGS:
        kept, old = (x[ring].unflatten(1, (7, 5))[~used] for x in (args, before))
        assert_same_bits(kept, old)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_no_norm_no_raw_and_a_table_of_their_own_for_the_keys(isa):
    args = make((2, 3, 5, 4, 3, 32), raw=False, norm=False, rows=2)
    args["key_frame_table"] = frame_table([1, 2, 3], 32)
    wide = copies(args, torch.float64)
    exact_q = rope_rotate(wide["q"], args["frame_table"], args["grid_table"])
    exact_k = rope_rotate(wide["k"], args["key_frame_table"], args["grid_table"])
    out = _cpu.append(*positional(args), isa=isa)
    assert_no_worse_than(out, exact_q.float(), exact_q)
    assert_no_worse_than(slots_of(args, args["ring_k"]), exact_k.float(), exact_k)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_number_of_threads_changes_no_bit(isa, dtype, threads):
    args = make((2, 2, 150, 3, 6, 64), dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        own = copies(args)
        results.append([_cpu.append(*positional(own), isa=isa), *(own[ring] for ring in RINGS)])
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_slots_may_be_strided(isa):
    args = make((2, 3, 5, 7, 3, 16), rows=2)
    expected = copies(args)
    out = _cpu.append(*positional(expected), isa=isa)
    args["slots"] = args["slots"].T.contiguous().T
    assert_same_bits(_cpu.append(*positional(args), isa=isa), out)
    for ring in RINGS:
        assert_same_bits(args[ring], expected[ring])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_no_head_and_no_stream_are_no_work(isa):
    for shape in ((2, 3, 5, 4, 0, 16), (0, 3, 5, 4, 3, 16)):
        args = make(shape)
        assert _cpu.append(*positional(args), isa=isa).shape == args["q"].shape


@pytest.fixture
def kernel_calls(monkeypatch):
    """Queries that the kernel was given."""
    calls, plain = [], _cpu.append
    monkeypatch.setattr(_cpu, "append", lambda q, *rest, **options: calls.append(q) or plain(q, *rest, **options))
    return calls


@needs_kernels
@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16}, False),
        ({"d": 24}, False),
        ({"weight": torch.bfloat16}, False),
        ({"backend": "reference"}, False),
    ],
    ids=str,
)
def test_the_kernel_is_taken_where_it_can_be(change, taken, kernel_calls):
    args = make((2, 3, 5, 4, 3, change.get("d", 16)), change.get("dtype", torch.float32))
    if "weight" in change:
        args["q_weight"] = args["q_weight"].to(change["weight"])
    expected = ring_append_ref(*positional(copies(args)))
    out = ring_append(**args, backend=change.get("backend", "auto"))
    assert len(kernel_calls) == taken
    wide = copies(args, torch.float64)
    exact = rope_rotate(plain_norm(wide["q"], wide["q_weight"]), args["frame_table"], args["grid_table"])
    assert_no_worse_than(out, expected, exact)


@needs_kernels
def test_a_strided_last_dim_is_left_to_pytorch(kernel_calls):
    args = make((2, 3, 5, 4, 3, 16))
    args["q"] = torch.randn(2, 15, 3, 32)[..., ::2]
    expected = ring_append_ref(*positional(copies(args)))
    assert_same_bits(ring_append(**args), expected)
    assert not kernel_calls


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [[0, 1, 4]]}, "slot 4 is outside a ring of 4 slots"),
        ({"slots": [[0, 1, -1]]}, "slot -1 is outside a ring of 4 slots"),
        ({"slots": [[0, 1]]}, r"slots must be \(-1, 3\), .* got \(1, 2\)"),
        ({"slots": [0, 1, 2]}, r"slots must be \(-1, 3\), .* got \(3,\)"),
        ({"slots": [[0.0, 1.0, 2.0]]}, "slots must be int64, got float32"),
        ({"slots": [[0, 1, 2]] * 3}, "slots has 3 rows for a batch of 2"),
        ({"slots": torch.zeros(0, 3, dtype=torch.int64)}, "slots has 0 rows for a batch of 2"),
        ({"k": (2, 14, 3, 16)}, r"k is float32 \(2, 14, 3, 16\)"),
        ({"v": (2, 15, 2, 16)}, r"v is float32 \(2, 15, 2, 16\)"),
        ({"out": (1, 15, 3, 16)}, r"out is float32 \(1, 15, 3, 16\)"),
        ({"ring_k": (2, 21, 3, 16)}, r"ring_k is float32 \(2, 21, 3, 16\).* frames have 5 tokens"),
        ({"ring_v": (2, 15, 3, 16)}, r"ring_v is float32 \(2, 15, 3, 16\)"),
        ({"ring_raw": (2, 20, 3, 32)}, r"ring_raw is float32 \(2, 20, 3, 32\)"),
        ({"q_weight": (47,)}, r"q_weight must be \(48,\), .* got \(47,\)"),
        ({"k_weight": (3, 16)}, r"k_weight must be \(48,\), .* got \(3, 16\)"),
        ({"frame_table": (1, 2, 4, 2)}, r"frame_table must be \(-1, 3, 4, 2\), .* got \(1, 2, 4, 2\)"),
        ({"frame_table": (3, 3, 4, 2)}, "frame_table has 3 rows for a batch of 2"),
        ({"key_frame_table": (1, 3, 3, 2)}, r"key_frame_table must be \(-1, 3, 4, 2\), .* got"),
        ({"grid_table": (4, 4, 2)}, "q has 15 tokens, no whole number of frames of 4"),
        ({"grid_table": (5, 9, 2)}, "grid_table has more than d / 2 pairs"),
        ({"grid_table": (5, 8, 2)}, r"frame_table must be \(-1, 3, 0, 2\), .* got \(1, 3, 4, 2\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_binding_rejects_what_python_missed(change, message):
    shapes = {
        **dict.fromkeys(("q", "k", "v", "out"), (2, 15, 3, 16)),
        **dict.fromkeys(RINGS, (2, 20, 3, 16)),
        **{"q_weight": (48,), "k_weight": (48,), "frame_table": (1, 3, 4, 2), "grid_table": (5, 4, 2)},
    }
    kept = {name: torch.zeros(shape) for name, shape in (shapes | change).items() if name != "slots"}
    kept["slots"] = torch.as_tensor(change.get("slots", [[0, 1, 2]]))
    views = {"key_frame_table": None} | {name: _native.view(x) for name, x in kept.items()}
    with pytest.raises(ValueError, match=f"echo_ext: .*{message}"):
        _native.module().ring_append_cpu(**views, eps=1e-6, threads=1)
