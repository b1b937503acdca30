"""The kernel of rope_rotate on the CPU: float64 oracle, strides, autograd, what it and its binding refuse."""

import pytest
import torch
from numerics import assert_no_worse_than
from test_rope import DTYPES, FAR, SHAPES, make, rotate_by_complex_numbers, shape_id, tables

from echo_ext import _native
from echo_ext.rope import rope_rotate, rope_rotate_ref

# Heads that don't fill a thread's share; each head dim with a kernel of its own; 32 and 6 have none.
KERNEL_SHAPES = [
    (1, 1, 1, 1, 1, 6),
    (2, 3, 3, 5, 3, 16),
    (1, 7, 1, 1, 5, 64),
    (1, 1, 2, 2, 9, 32),
    (2, 2, 2, 3, 4, 128),
]
BACKENDS = ["kernel", "reference"]


@pytest.mark.sanitizers
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=shape_id)
def test_kernel_matches_complex_numbers(shape, dtype, strided, emulated):
    x, ids, frame, grid = make(shape, dtype, strided=strided)
    out = rope_rotate(x, frame, grid, backend="kernel")
    assert out.is_contiguous()
    assert emulated.counters().launches == 1
    assert_no_worse_than(out, rope_rotate_ref(x, frame, grid), rotate_by_complex_numbers(x, ids, *shape[2:4]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_takes_any_alignment_and_ids_per_stream(dtype, emulated):
    ids = torch.tensor([[0, 1], [FAR, FAR + 1]])
    x, frame, grid = (
        torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
        for t in (torch.randn(2, 6, 3, 16).to(dtype), *tables(ids, 1, 3, 16))
    )
    out = rope_rotate(x, frame, grid, backend="kernel")
    assert_no_worse_than(out, rope_rotate_ref(x, frame, grid), rotate_by_complex_numbers(x, ids, 1, 3))


def test_kernel_takes_heads_before_tokens_and_no_tokens_at_all(emulated):
    x, ids, frame, grid = make((2, 2, 1, 3, 3, 16))
    swapped = x.transpose(1, 2).contiguous().transpose(1, 2)
    out = rope_rotate(swapped, frame, grid, backend="kernel")
    assert_no_worse_than(out, rope_rotate_ref(x, frame, grid), rotate_by_complex_numbers(x, ids, 1, 3))
    assert rope_rotate(x[:0], frame, grid, backend="kernel").shape == (0, 6, 3, 16)
    assert rope_rotate(x[:, :0], frame[:, :0], grid, backend="kernel").shape == (2, 0, 3, 16)


def test_gradient_through_the_kernel_is_the_rotation_back(emulated):
    x, _, frame, grid = make(SHAPES[1], requires_grad=True)
    grads = [torch.autograd.grad(rope_rotate(x, frame, grid, backend=b).square().sum(), x)[0] for b in BACKENDS]
    assert emulated.counters().launches == 1
    assert_no_worse_than(grads[0], grads[1], 2 * x.detach().double())


def test_kernel_op_registration(emulated):
    x, _, frame, grid = make(SHAPES[1], torch.bfloat16, strided=True)
    torch.library.opcheck(torch.ops.echo_ext.rope_rotate.default, (x, frame, grid))
    assert emulated.counters().launches > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, on any Function
def test_kernel_compiles_without_graph_break(emulated):
    x, _, frame, grid = make(SHAPES[1], requires_grad=True)
    compiled = torch.compile(
        lambda x: rope_rotate(x, frame, grid, backend="kernel"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), rope_rotate(x, frame, grid))
    assert emulated.counters().launches == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(1, 6, 2, 16, dtype=torch.float64)}, "dtype torch.float64 is not built"),
        ({"x": torch.zeros(1, 6, 16, 2).mT}, r"x has no contiguous last dim: strides \(192, 32, 1, 2\)"),
        ({"grid_table": torch.zeros(3, 4, 2, dtype=torch.float64)}, "grid_table is torch.float64"),
        (
            {"frame_table": torch.zeros(1, 2, 2, 4).mT},
            r"frame_table is not dense in its last two dims: strides \(16, 8, 1, 4\)",
        ),
        ({"grid_table": torch.zeros(3, 4, 3)[..., :2]}, r"grid_table is not dense in its last two dims"),
    ],
)
def test_what_the_kernel_cannot_take_is_rotated_by_pytorch(change, reason, emulated):
    frame, grid = tables([0, 1], 1, 3, 16)
    args = {"x": torch.zeros(1, 6, 2, 16), "frame_table": frame, "grid_table": grid, **change}
    with pytest.raises(RuntimeError, match=f"rope_rotate: kernel can't run: {reason}"):
        rope_rotate(**args, backend="kernel")
    assert rope_rotate(**args).dtype == args["x"].dtype
    assert emulated.counters().launches == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 2, 16)}, r"x must be \(-1, -1, -1, -1\), -1 for any size, got \(6, 2, 16\)"),
        ({"x": torch.zeros(1, 6, 16, 2).mT}, "x must have a contiguous last dim"),
        ({"out": torch.zeros(1, 6, 2, 8)}, r"out must be \(1, 6, 2, 16\), .* got \(1, 6, 2, 8\)"),
        ({"out": torch.zeros(1, 6, 2, 16).half()}, "out must be float32, got float16"),
        ({"frame_table": torch.zeros(1, 2, 4, 2).half()}, "frame_table must be float32, got float16"),
        ({"grid_table": torch.zeros(3, 4, 2).half()}, "grid_table must be float32, got float16"),
        ({"frame_table": torch.zeros(3, 2, 4, 2)}, "frame_table has 3 rows for a batch of 1"),
        ({"frame_table": torch.zeros(1, 3, 4, 2)}, "x has 6 tokens, the tables describe 3 frames of 3"),
        ({"grid_table": torch.zeros(3, 5, 2)}, r"x has d=16, the tables describe 4 \+ 5 pairs"),
        ({"grid_table": torch.zeros(4, 3, 2).transpose(0, 1)}, "grid_table must be dense in its last two"),
    ],
)
def test_binding_rejects_what_python_missed(change, message, emulated):
    frame, grid = tables([0, 1], 1, 3, 16)
    x = torch.zeros(1, 6, 2, 16)
    args = {"x": x, "frame_table": frame, "grid_table": grid, "out": torch.zeros(1, 6, 2, 16), **change}
    with pytest.raises(ValueError, match=f"echo_ext: {message}"):
        _native.module().rope_rotate_fwd(**{k: _native.view(t) for k, t in args.items()}, stream=(0, 0))
