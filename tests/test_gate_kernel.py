"""The kernel of gate_blend on the CPU: seeded shapes, dtypes side by side, what it and its binding refuse."""

import mmap
import random

import pytest
import torch
from numerics import assert_no_worse_than
from test_memory import DTYPES, in_float64, make_gate

from echo_ext import _native
from echo_ext.gate import gate_blend, gate_blend_ref

# State and weight: the same, or 16 bits beside a float32 state.
PAIRS = {name: (dtype, dtype) for name, dtype in DTYPES.items()}
PAIRS |= {f"f32 state, {name}": (torch.float32, dtype) for name, dtype in DTYPES.items() if name != "f32"}


def seeded_shapes(count):
    """(B, T, D): one vector, exactly a tile, past a tile in each direction, and anything."""
    draw = random.Random(5)
    shapes = [(1, 1, 8), (1, 128, 32), (1, 129, 8), (1, 3, 128), (1, 3, 136), (3, 43, 24)]
    while len(shapes) < count:
        shapes.append((draw.randint(1, 3), draw.randint(1, 20), 8 * draw.randint(1, 14)))
    return shapes


SHAPES = seeded_shapes(40)


def make(shape, pair, **kwargs):
    """Arguments of the op; state and weight in the dtypes of ``pair``."""
    state, proposal, weight, bias = make_gate(*shape, **kwargs)
    return state.to(pair[0]), proposal.to(pair[0]), weight.to(pair[1]), bias.to(pair[1])


def assert_blends(args):
    out = gate_blend(*args, backend="kernel")
    assert_no_worse_than(out, gate_blend_ref(*args), gate_blend_ref(*in_float64(args)))
    assert out.is_contiguous()


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-D{}".format(*s))
def test_kernel_matches_reference(shape, pair, emulated):
    assert_blends(make(shape, pair, strided=sum(shape) % 2))
    assert emulated.counters().launches == 1


@pytest.mark.sanitizers
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_kernel_under_the_sanitizers(pair, emulated):
    assert_blends(make((2, 5, 40), pair, strided=True))


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_neither_share_of_the_weight_is_read_for_the_other(pair, emulated):
    """Columns of the state are of another size than the proposal's, and neither width fills a step."""
    state, proposal, weight, bias = make((1, 3, 40), pair)
    weight[:, :40] *= 8
    assert_blends((state, proposal, weight, bias))


def test_kernel_meets_no_bank_conflict(emulated):
    for pair in ("bf16", "f16"):
        assert_blends(make((1, 130, 64), PAIRS[pair]))
    assert emulated.counters().collectives > 0
    assert emulated.counters().bank_conflicts == 0


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("logit", [200.0, -200.0])
def test_saturated_gate_keeps_or_replaces_bit_for_bit(logit, pair, emulated):
    state, proposal, weight, bias = make((2, 5, 16), pair)
    out = gate_blend(state, proposal, torch.zeros_like(weight), torch.full_like(bias, logit), backend="kernel")
    assert torch.equal(out, state if logit > 0 else proposal)


def test_an_infinite_token_stays_alone(emulated):
    state, proposal, weight, bias = make((1, 3, 16), PAIRS["bf16"])
    clean = gate_blend(state, proposal, weight, bias, backend="kernel")
    proposal[0, 1, 5] = float("inf")
    out = gate_blend(state, proposal, weight, bias, backend="kernel")
    assert not out[0, 1].isfinite().all()
    assert torch.equal(out[:, ::2], clean[:, ::2])


def test_start_of_all_streams_is_one_row_repeated(emulated):
    state, proposal, weight, bias = make((3, 5, 16), PAIRS["f32 state, bf16"])
    assert_blends((state[:1].expand(3, -1, -1), proposal, weight, bias))


def test_no_tokens_and_no_streams(emulated):
    state, proposal, weight, bias = make((2, 5, 16), PAIRS["bf16"])
    assert gate_blend(state[:0], proposal[:0], weight, bias, backend="kernel").shape == (0, 5, 16)
    assert gate_blend(state[:, :0], proposal[:, :0], weight, bias, backend="kernel").shape == (2, 0, 16)


def test_states_beyond_32_bit_offsets(emulated):
    """Streams 2^31 elements apart in one buffer, of which only the touched pages exist."""
    _, proposal, weight, bias = make((2, 3, 16), PAIRS["bf16"])
    memory = mmap.mmap(-1, 2 * (2**31 + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    state = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 3, 16), (2**31, 16, 1))
    assert_blends((state.normal_(), proposal, weight, bias))


def test_gradient_through_the_kernel_is_the_references(emulated):
    args = make((2, 3, 16), PAIRS["f32"])
    for x in args:
        x.requires_grad_()
    grads = [torch.autograd.grad(gate_blend(*args, backend=b).square().sum(), args) for b in ("kernel", "reference")]
    for x, y in zip(*grads, strict=True):
        assert_no_worse_than(x, y, y.double())
    assert emulated.counters().launches == 1


def test_kernel_op_registration_and_compilation(emulated):
    args = make((2, 3, 16), PAIRS["bf16"], strided=True)
    torch.library.opcheck(torch.ops.echo_ext.gate_blend.default, args)
    compiled = torch.compile(lambda *a: gate_blend(*a, backend="kernel"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), gate_blend(*args, backend="kernel"))


@pytest.mark.parametrize(
    ("dtypes", "shape", "reason"),
    [
        ((torch.float64, torch.float64), (1, 1, 8), "dtype torch.float64 is not built"),
        (
            (torch.bfloat16, torch.float32),
            (1, 1, 8),
            "float32 weights are not built beside a torch.bfloat16 state",
        ),
        (
            (torch.float16, torch.bfloat16),
            (1, 1, 8),
            "bfloat16 weights are not built beside a torch.float16 state",
        ),
        ((torch.float32, torch.bfloat16), (1, 1, 12), "the last dim of bias is 12, no multiple of 8"),
        ((torch.float32, torch.float32), (1, 1, 6), "the last dim of state is 6, no multiple of 4"),
    ],
)
def test_what_the_kernel_cannot_take_is_blended_by_pytorch(dtypes, shape, reason, emulated):
    args = make(shape, dtypes)
    with pytest.raises(RuntimeError, match=f"gate_blend: kernel can't run: .*{reason}"):
        gate_blend(*args, backend="kernel")
    assert gate_blend(*args).dtype == dtypes[0]
    assert emulated.counters().launches == 0


@pytest.mark.parametrize("name", ["state", "proposal", "weight", "bias"])
def test_layouts_the_kernel_cannot_take(name, emulated):
    args = dict(zip(("state", "proposal", "weight", "bias"), make((2, 3, 16), PAIRS["f32"]), strict=True))
    wide = torch.zeros(*args[name].shape[:-1], 2 * args[name].shape[-1])
    with pytest.raises(RuntimeError, match=f"the last dim of {name} is strided"):
        gate_blend(**args | {name: wide[..., ::2]}, backend="kernel")
    with pytest.raises(RuntimeError, match=f"rows of {name} don't start at multiples of 16 bytes"):
        gate_blend(**args | {name: wide[..., 1 : 1 + args[name].shape[-1]]}, backend="kernel")


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": zeros(3, 16)}, r"state must be \(-1, -1, -1\)"),
        ({"proposal": zeros(2, 4, 16)}, r"proposal must be \(2, 3, 16\)"),
        ({"proposal": zeros(2, 3, 16).half()}, "proposal must be float32, got float16"),
        ({"weight": zeros(16, 16)}, r"weight must be \(16, 32\)"),
        ({"weight": zeros(16, 64)[:, ::2]}, "weight must have a contiguous last dim"),
        ({"weight": zeros(16, 34)[:, :32]}, "weight must have rows that fill and start at multiples of 16 bytes"),
        ({"bias": zeros(32)}, r"bias must be \(16,\)"),
        ({"bias": zeros(16).half()}, "bias must be float32, got float16"),
        ({"out": zeros(2, 3, 32)[..., :16]}, "out must be contiguous"),
        ({"out": zeros(2, 3, 16).half()}, "out must be float32, got float16"),
        ({"state": zeros(97)[1:].view(2, 3, 16)}, "state must have rows that fill and start at multiples of 16 bytes"),
    ],
)
def test_binding_rejects_what_python_missed(change, message, emulated):
    args = {"state": zeros(2, 3, 16), "proposal": zeros(2, 3, 16), "weight": zeros(16, 32), "bias": zeros(16)}
    args |= {"out": zeros(2, 3, 16)} | change
    with pytest.raises(ValueError, match=f"echo_ext: {message}"):
        _native.module().gate_blend_fwd(**{name: _native.view(x) for name, x in args.items()}, stream=(0, 0))
    assert emulated.counters().launches == 0


def test_binding_rejects_dtypes_that_are_not_built(emulated):
    state, weight = _native.view(zeros(2, 3, 16).half()), _native.view(zeros(16, 32))
    args = {"state": state, "proposal": state, "weight": weight, "bias": _native.view(zeros(16)), "out": state}
    with pytest.raises(ValueError, match="echo_ext: state is float16, weight float32: not built"):
        _native.module().gate_blend_fwd(**args, stream=(0, 0))
