"""rope_rotate and its tables: golden data, float64 oracle, ids without end, contract, autograd, torch.compile."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_golden, assert_no_worse_than
from safetensors.torch import load_file

from echo_ext import _native
from echo_ext.rope import axis_pairs, frame_table, grid_table, rope_rotate, rope_rotate_ref

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# (B, F, rows, columns, H, d): one token; ragged; many frames of one token; the official heads scaled down.
SHAPES = [(1, 1, 1, 1, 1, 6), (2, 3, 3, 5, 3, 16), (1, 7, 1, 1, 2, 64), (2, 3, 2, 3, 12, 128)]
FAR = 345_600  # a day of latent frames


def shape_id(shape):
    return "B{}-F{}-{}x{}-H{}-d{}".format(*shape)


def tokens_of(rows, columns):
    """Row and column of each token of a frame."""
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return cells[:, 0], cells[:, 1]


def tables(ids, rows, columns, d, device="cpu"):
    return frame_table(ids, d, device=device), grid_table(*tokens_of(rows, columns), d, device=device)


def angles(p, pairs):
    """``p * 10000^(-2j / axis_dim)`` for positions ``p`` ``(...)``, spelt out in extended precision."""
    j = np.arange(pairs, dtype=np.longdouble)
    frequencies = np.longdouble(10000) ** (-2 * j / np.longdouble(2 * pairs))
    return np.asarray(p, dtype=np.longdouble)[..., None] * frequencies


def rotate_by_complex_numbers(x, ids, rows, columns):
    """Oracle: ``x`` ``(B, F * T_f, H, d)`` times ``exp(i angle)``, in float64, from ids ``(B or 1, F)``."""
    n_t, n_row, n_column = axis_pairs(x.shape[-1])
    frames, (row, column) = ids.shape[-1], tokens_of(rows, columns)
    grid = np.concatenate([angles(row, n_row), angles(column, n_column)], -1)
    frame = angles(ids, n_t)[:, :, None]
    shape = (ids.shape[0], frames, rows * columns)
    phase = np.concatenate([np.broadcast_to(frame, (*shape, n_t)), np.broadcast_to(grid, (*shape, grid.shape[-1]))], -1)
    turn = torch.from_numpy(np.exp(1j * phase).astype(np.complex128)).flatten(1, 2)[:, :, None]
    pairs = torch.view_as_complex(x.double().cpu().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.device)


def make(shape, dtype=torch.float32, device="cpu", *, strided=False, ids=None, requires_grad=False):
    """``x``, ids ``(1, F)`` and both tables."""
    B, F, rows, columns, H, d = shape
    # Strided tensors are slices of a wider buffer, as a fused projection's are; the rest is poison.
    wide = torch.full((B, F * rows * columns + strided, H, d + 2 * strided), float("nan"), dtype=dtype, device=device)
    wide[:, : F * rows * columns, :, :d] = torch.randn(B, F * rows * columns, H, d, device=device)
    x = wide[:, : F * rows * columns, :, :d].requires_grad_(requires_grad)
    ids = torch.arange(5, 5 + F)[None] if ids is None else ids
    return x, ids, *tables(ids, rows, columns, d, device)


@pytest.fixture
def through_the_op(monkeypatch):
    """Send CPU tensors down the kernel's path (op, autograd, fake), ending in the CPU implementation."""
    monkeypatch.setattr("echo_ext.rope._why_not_kernel", lambda *args: None)


@pytest.fixture(scope="module")
def golden():
    folder = Path(__file__).parent / "data" / "golden"
    return json.loads((folder / "rope.json").read_text()), load_file(folder / "rope.safetensors")


def test_rotation_matches_golden_data(golden):
    settings, tensors = golden
    checked = 0
    for case in settings["cases"]:
        x, y = tensors[f"{case['key']}.x"], tensors[f"{case['key']}.y"]
        ids = range(case["start_frame"], case["start_frame"] + case["f"])
        tokens = case["f"] * case["h"] * case["w"]  # the golden data carry padding past them, unrotated
        assert torch.equal(x[:, tokens:], y[:, tokens:])
        if tokens:
            out = rope_rotate(x[:, :tokens], *tables(list(ids), case["h"], case["w"], case["head_dim"]))
            assert_golden(out, y[:, :tokens])
            checked += 1
    assert checked == 36


def test_streams_of_different_lengths_match_golden_data_row_by_row(golden):
    _, tensors = golden
    x, y = tensors["mixed.x"], tensors["mixed.y"]
    for row, (frames, tokens) in enumerate([(2, 24), (1, 12)]):
        out = rope_rotate(x[row : row + 1, :tokens], *tables(list(range(5, 5 + frames)), 3, 4, 16))
        assert_golden(out, y[row : row + 1, :tokens])


@pytest.mark.parametrize("d", [16, 128])
def test_angles_match_the_golden_float64_tables(golden, d, monkeypatch):
    monkeypatch.setattr("torch.Tensor.float", lambda x: x)  # the tables before they are rounded
    _, tensors = golden
    cos, sin = tensors[f"table{d}.head.cos"], tensors[f"table{d}.head.sin"]  # (64 positions, d / 2)
    p = torch.arange(64)
    table = torch.cat([frame_table(p, d)[0], grid_table(p, p, d)], dim=1)
    assert table.dtype == torch.float64
    assert_no_worse_than(table[..., 0], cos, cos)
    assert_no_worse_than(table[..., 1], sin, sin)


@pytest.mark.parametrize("d", [6, 16, 64, 128])
def test_pairs_split_as_the_method_says(d):
    assert axis_pairs(d) == {6: (1, 1, 1), 16: (4, 2, 2), 64: (12, 10, 10), 128: (22, 21, 21)}[d]


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_complex_numbers_in_float64(device, shape, dtype, strided):
    x, ids, frame, grid = make(shape, dtype, device, strided=strided)
    exact = rotate_by_complex_numbers(x, ids, *shape[2:4])
    out = rope_rotate(x, frame, grid)
    assert out.is_contiguous()
    assert_no_worse_than(out, exact.to(dtype), exact)
    assert_no_worse_than(out, rope_rotate_ref(x, frame, grid), exact)


def test_float64_stays_float64():
    x, _, frame, grid = make(SHAPES[1], torch.float64)
    assert rope_rotate(x, frame, grid).dtype == torch.float64


@pytest.mark.parametrize("ids", [[FAR, FAR + 1, FAR + 2], [-3, 0, 1023], [0.25, 1.5, 20.0]], ids=str)
def test_any_id_is_as_exact_as_id_0(ids):
    shape = (2, 3, 3, 5, 3, 128)
    x, ids, frame, grid = make(shape, ids=torch.tensor([ids]))
    n_t = axis_pairs(128)[0]
    phase = angles(ids, n_t)
    exact = torch.from_numpy(np.stack([np.cos(phase), np.sin(phase)], -1).astype(np.float64))
    assert_no_worse_than(frame, exact.float(), exact)
    exact = rotate_by_complex_numbers(x, ids, 3, 5)
    assert_no_worse_than(rope_rotate(x, frame, grid), exact.float(), exact)


def test_rows_and_columns_may_be_fractions():
    rows, columns = torch.tensor([0.5, 0.5, 2.5]), torch.tensor([0.25, 3.0, 1.75])
    _, n_row, n_column = axis_pairs(64)
    phase = np.concatenate([angles(rows, n_row), angles(columns, n_column)], -1)
    exact = torch.from_numpy(np.stack([np.cos(phase), np.sin(phase)], -1).astype(np.float64))
    assert_no_worse_than(grid_table(rows, columns, 64), exact.float(), exact)


def test_every_stream_of_a_batch_can_have_its_own_ids():
    ids = torch.tensor([[0, 1, 2], [FAR, FAR + 1, FAR + 2]])
    x, _, frame, grid = make((2, 3, 3, 5, 3, 16), ids=ids)
    out = rope_rotate(x, frame, grid)
    for row in range(2):
        alone = rope_rotate(x[row : row + 1], frame_table(ids[row], 16), grid)
        assert torch.equal(out[row : row + 1], alone)


@pytest.mark.parametrize("shift", [1, 20, FAR])
def test_scores_depend_on_the_difference_of_ids_only(shift):
    q, ids, _, grid = make((1, 3, 2, 3, 2, 128))
    k = torch.randn_like(q)

    def scores(a, b, rotate):
        return torch.einsum("bihd,bjhd->bhij", rotate(q, a), rotate(k, b))

    def ours(x, i):
        return rope_rotate(x, frame_table(i, 128), grid)

    exact = scores(ids, ids + 7, lambda x, i: rotate_by_complex_numbers(x, i, 2, 3))
    here, there = scores(ids, ids + 7, ours), scores(ids + shift, ids + shift + 7, ours)
    assert_no_worse_than(there, here, exact)
    assert not torch.allclose(there, scores(ids, ids + 8, ours))


def test_rotation_at_the_origin_changes_no_bit():
    x, _, frame, grid = make((2, 1, 1, 1, 3, 64), ids=torch.zeros(1, 1))
    assert torch.equal(rope_rotate(x, frame, grid), x)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_keeps_lengths_at_extreme_sizes(size):
    x, ids, frame, grid = make(SHAPES[1])
    exact = rotate_by_complex_numbers(x * size, ids, 3, 5)
    assert_no_worse_than(rope_rotate(x * size, frame, grid), exact.float(), exact)


def test_rotating_back_restores_the_input():
    x, _, frame, grid = make(SHAPES[3], torch.float64)
    back = torch.tensor([1.0, -1.0])
    assert_no_worse_than(
        rope_rotate(rope_rotate(x, frame, grid), frame * back, grid * back).float(), x.float(), x.float()
    )


@pytest.mark.parametrize("rows", [1, 2], ids=["shared ids", "ids per stream"])
def test_gradients_of_reference(rows):
    ids = torch.arange(2 * rows).view(rows, 2)
    x, _, frame, grid = make((2, 2, 1, 2, 2, 6), torch.float64, requires_grad=True, ids=ids)
    assert torch.autograd.gradcheck(lambda x: rope_rotate(x, frame, grid), (x,))


@pytest.mark.parametrize("rows", [1, 2], ids=["shared ids", "ids per stream"])
def test_gradients_of_op(rows, through_the_op):
    ids = torch.arange(2 * rows).view(rows, 2)
    x, _, frame, grid = make((2, 2, 1, 2, 2, 6), torch.float64, requires_grad=True, ids=ids)
    assert torch.autograd.gradcheck(lambda x: rope_rotate(x, frame, grid), (x,))


@pytest.mark.parametrize("device", DEVICES)
def test_op_registration(device):
    for dtype, strided in ((torch.float32, False), (torch.bfloat16, True)):
        x, _, frame, grid = make(SHAPES[1], dtype, device, strided=strided)
        torch.library.opcheck(torch.ops.echo_ext.rope_rotate.default, (x, frame, grid))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, on any Function
def test_compiles_without_graph_break(device, grad, through_the_op):
    x, _, frame, grid = make(SHAPES[1], device=device, requires_grad=grad)
    compiled = torch.compile(rope_rotate, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, frame, grid), rope_rotate(x, frame, grid)
    assert torch.equal(out, expected)
    if grad:
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)]
        assert torch.equal(*grads)


def test_fallback_compiles_without_graph_break():
    x, _, frame, grid = make(SHAPES[1])
    compiled = torch.compile(rope_rotate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, frame, grid), rope_rotate(x, frame, grid))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 6, 16)}, r"x must be \(B, T, H, d\), got \(1, 6, 16\)"),
        ({"x": torch.zeros(1, 6, 2, 15)}, "head_dim must be even and >= 6 for three rotary axes, got 15"),
        ({"x": torch.zeros(1, 7, 2, 16)}, "got 7 tokens, the tables describe 2 frames of 3"),
        ({"x": torch.zeros(1, 6, 2, 64)}, r"frame_table must be \(B, F, 12, 2\) for d=64, got \(1, 2, 4, 2\)"),
        ({"grid_table": torch.zeros(3, 5, 2)}, r"grid_table must be \(T_f, 4, 2\), got \(3, 5, 2\)"),
        ({"frame_table": torch.zeros(2, 4, 2)}, r"frame_table must be \(B, F, 4, 2\) .* got \(2, 4, 2\)"),
        ({"frame_table": torch.zeros(3, 2, 4, 2)}, "frame_table has 3 rows for a batch of 1"),
        ({"frame_table": torch.zeros(1, 2, 4, 2, device="meta")}, "frame_table is on meta, x is on cpu"),
        ({"grid_table": torch.zeros(3, 4, 2, device="meta")}, "grid_table is on meta, x is on cpu"),
        ({"backend": "cuda"}, "backend must be 'auto', 'kernel' or 'reference', got 'cuda'"),
    ],
)
def test_rejects(change, message):
    frame, grid = tables([0, 1], 1, 3, 16)
    args = {"x": torch.zeros(1, 6, 2, 16), "frame_table": frame, "grid_table": grid, **change}
    with pytest.raises(ValueError, match=message):
        rope_rotate(**args)


@pytest.mark.parametrize("d", [4, 7])
def test_tables_reject_heads_without_three_axes(d):
    with pytest.raises(ValueError, match=f"head_dim must be even and >= 6 for three rotary axes, got {d}"):
        frame_table([0], d)
    with pytest.raises(ValueError, match=f"head_dim must be even and >= 6 for three rotary axes, got {d}"):
        grid_table([0], [0], d)


def test_kernel_asked_for_by_name_says_why_it_cannot_run():
    x, _, frame, grid = make(SHAPES[1])
    with pytest.raises(RuntimeError, match="rope_rotate: kernel can't run: x is on cpu"):
        rope_rotate(x, frame, grid, backend="kernel")


@pytest.mark.gpu
def test_kernel_runs_or_says_that_the_build_lacks_it():
    x, _, frame, grid = make(SHAPES[3], device="cuda")
    if hasattr(_native.module(), "rope_rotate_fwd"):
        assert rope_rotate(x, frame, grid, backend="kernel").is_cuda
    else:
        with pytest.raises(RuntimeError, match="this build has no rope_rotate kernel"):
            rope_rotate(x, frame, grid, backend="kernel")


@pytest.mark.gpu
def test_graph_replay_sees_new_inputs():
    x, _, frame, grid = make(SHAPES[3], torch.bfloat16, "cuda")
    rope_rotate(x, frame, grid)  # the first call loads modules; capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rope_rotate(x, frame, grid)
    x.normal_()
    frame.copy_(frame_table([FAR, FAR + 1, FAR + 2], 128))
    graph.replay()
    assert torch.equal(out, rope_rotate(x, frame, grid))
