"""3-D rotary positions by arbitrary per-frame ids: tables built once on the host, tokens rotated in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from echo_ext import _native
from echo_ext._dispatch import Backend, register, why_not_kernel, without_cuda_kernel

_THETA = 10000.0
_LIB = torch.library.Library("echo_ext", "FRAGMENT")
_LIB.define("rope_rotate(Tensor x, Tensor frame_table, Tensor grid_table) -> Tensor")


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return how many complex pairs of a head rotate by frame id, row and column.

    Args:
        head_dim: ``d``, even and at least 6 so that every axis has a pair.

    Raises:
        ValueError: ``head_dim`` is odd or too small.

    Source: docs/method.md section 3; d = 128 gives 22 | 21 | 21.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim must be even and >= 6 for three rotary axes, got {head_dim}")
    spatial = head_dim // 2 // 3
    return head_dim // 2 - 2 * spatial, spatial, spatial


def frame_table(
    ids: Tensor | Sequence[float] | Sequence[Sequence[float]],
    head_dim: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build cos and sin of the temporal pairs for each frame id.

    Args:
        ids: ``(F,)`` or ``(B, F)`` frame ids, any integer or float; a row per batch element.
        head_dim: ``d``.
        device: where the table goes; the angles are computed in float64 on the host.

    Returns:
        ``(B or 1, F, n_t, 2)`` float32, last dim cos and sin: exact at id 345,600 as at id 0.

    Source: docs/method.md section 3.
    """
    ids = torch.as_tensor(ids, dtype=torch.float64, device="cpu")
    ids = ids[None] if ids.ndim == 1 else ids
    return _cos_sin(ids[..., None] * _frequencies(axis_pairs(head_dim)[0])).to(device=device, non_blocking=True)


def grid_table(
    rows: Tensor | Sequence[float],
    columns: Tensor | Sequence[float],
    head_dim: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build cos and sin of the spatial pairs for the tokens of one frame.

    Args:
        rows: ``(T_f,)`` row of each token; fractional for a coarser grid of memory tokens.
        columns: ``(T_f,)`` column of each token.
        head_dim: ``d``.
        device: where the table goes.

    Returns:
        ``(T_f, n_s, 2)`` float32: the row pairs, then the column pairs; last dim cos and sin.

    Source: docs/method.md section 3.
    """
    _, n_row, n_column = axis_pairs(head_dim)
    rows = torch.as_tensor(rows, dtype=torch.float64, device="cpu")
    columns = torch.as_tensor(columns, dtype=torch.float64, device="cpu")
    angles = [rows[:, None] * _frequencies(n_row), columns[:, None] * _frequencies(n_column)]
    return _cos_sin(torch.cat(angles, dim=-1)).to(device=device, non_blocking=True)


def rope_rotate(x: Tensor, frame_table: Tensor, grid_table: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Rotate the interleaved pairs of every head by frame, row and column.

    ``(x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos)`` with the pair's angle.

    Args:
        x: ``(B, F * T_f, H, d)`` queries or keys, float32, float16, bfloat16 or float64.
        frame_table: ``(B or 1, F, n_t, 2)`` float32 from :func:`frame_table`.
        grid_table: ``(T_f, n_s, 2)`` float32 from :func:`grid_table`.
        backend: ``"kernel"`` raises where the CUDA kernel can't run; ``"auto"`` falls back.

    Returns:
        ``(B, F * T_f, H, d)`` in ``x.dtype``, contiguous; rotated in float32 (float64 stays float64).

    Raises:
        ValueError: shapes or devices disagree.
        RuntimeError: ``backend="kernel"`` and the kernel can't run; says why.

    Source: docs/method.md section 3.
    """
    _check(x, frame_table, grid_table)
    if without_cuda_kernel("rope_rotate", backend, _why_not_kernel(x, frame_table, grid_table)):
        return rope_rotate_ref(x, frame_table, grid_table)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RopeRotate.apply(x, frame_table, grid_table)
    return torch.ops.echo_ext.rope_rotate(x, frame_table, grid_table)


def rope_rotate_ref(x: Tensor, frame_table: Tensor, grid_table: Tensor) -> Tensor:
    """The fallback, and in float64 the oracle: differentiable, any device, any even head dim."""
    return rotate_pairs(x, *expand_tables(frame_table, grid_table))


def kept(build: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Keep the last few results of ``build(table, ...)`` on the CPU: layers and steps of a block share their tables.

    Tables are compared by identity: they are values, nobody writes into them. Elsewhere graph replay does.
    """

    @functools.lru_cache(maxsize=8)
    def keep(inference: bool, *args: object) -> tuple[Tensor, Tensor]:
        return build(*args)

    @functools.wraps(build)
    def get(table: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        if table.device.type != "cpu" or torch.compiler.is_compiling():
            return build(table, *args)
        return keep(torch.is_inference_mode_enabled(), table, *args)

    return get


@kept
def expand_tables(frame_table: Tensor, grid_table: Tensor) -> tuple[Tensor, Tensor]:
    """Spread the two small tables to ``(B or 1, T, 1, d)`` cos and signed sin, one value an element."""
    b, f, n_t, _ = frame_table.shape
    t_f, n_s, _ = grid_table.shape
    frame = frame_table[:, :, None].expand(b, f, t_f, n_t, 2)
    grid = grid_table[None, None].expand(b, f, t_f, n_s, 2)
    cos, sin = torch.cat([frame, grid], dim=3).reshape(b, f * t_f, 1, n_t + n_s, 2).unbind(-1)
    return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)


@kept
def expand_shift(shift: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Spread one angle a temporal pair, ``(B or 1, n_t, 2)``, to ``(B or 1, 1, 1, d)``; spatial pairs stay."""
    still = shift.new_tensor([1.0, 0.0]).expand(1, sum(axis_pairs(head_dim)[1:]), 2)
    return expand_tables(shift[:, None], still)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``(B, T, H, d)`` by tables from :func:`expand_tables`; returns ``x.dtype``, contiguous."""
    wide = torch.promote_types(x.dtype, torch.float32)
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).view(x.shape)  # (x0, x1) -> (x1, x0), while it is narrow
    return torch.addcmul(x.to(wide) * cos, swapped.to(wide), sin).to(x.dtype)


@functools.cache
def _frequencies(pairs: int) -> Tensor:
    return _THETA ** -(torch.arange(pairs, dtype=torch.float64) / pairs)


def _cos_sin(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def _check(x: Tensor, frame_table: Tensor, grid_table: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (B, T, H, d), got {tuple(x.shape)}")
    check_tables(x.shape[0], x.shape[1], x.shape[3], frame_table, grid_table)
    for name, table in (("frame_table", frame_table), ("grid_table", grid_table)):
        if table.device != x.device:
            raise ValueError(f"{name} is on {table.device}, x is on {x.device}")


def check_tables(batch: int, tokens: int, head_dim: int, frame_table: Tensor, grid_table: Tensor) -> None:
    """Raise ValueError unless the tables describe ``tokens`` tokens of ``batch`` rows and ``head_dim``."""
    n_t, n_row, n_column = axis_pairs(head_dim)
    if frame_table.ndim != 4 or frame_table.shape[2:] != (n_t, 2):
        raise ValueError(f"frame_table must be (B, F, {n_t}, 2) for d={head_dim}, got {tuple(frame_table.shape)}")
    if grid_table.ndim != 3 or grid_table.shape[1:] != (n_row + n_column, 2):
        raise ValueError(f"grid_table must be (T_f, {n_row + n_column}, 2), got {tuple(grid_table.shape)}")
    if frame_table.shape[0] not in (1, batch):
        raise ValueError(f"frame_table has {frame_table.shape[0]} rows for a batch of {batch}")
    frames, tokens_per_frame = frame_table.shape[1], grid_table.shape[0]
    if frames * tokens_per_frame != tokens:
        raise ValueError(f"got {tokens} tokens, the tables describe {frames} frames of {tokens_per_frame}")


def _why_not_kernel(x: Tensor, frame_table: Tensor, grid_table: Tensor) -> str | None:
    """The first reason the CUDA kernel can't take these tensors, or None if it can."""
    if reason := why_not_kernel("rope_rotate", x, "x"):
        return reason
    if x.stride(-1) != 1:
        return f"x has no contiguous last dim: strides {x.stride()}"
    for name, table in (("frame_table", frame_table), ("grid_table", grid_table)):
        if reason := why_not_table(table, name):
            return reason
    return None


def why_not_table(table: Tensor, name: str) -> str | None:
    """Why no kernel reads this table, or None."""
    if table.dtype != torch.float32:
        return f"{name} is {table.dtype}"
    if table.stride(-1) != 1 or (table.shape[-2] > 1 and table.stride(-2) != 2):
        return f"{name} is not dense in its last two dims: strides {table.stride()}"
    return None


def _kernel(x: Tensor, frame_table: Tensor, grid_table: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    views = (_native.view(t) for t in (x, frame_table, grid_table, out))
    _native.module().rope_rotate_fwd(*views, _native.stream_of(x))
    return out


class _RopeRotate(torch.autograd.Function):
    """Op forward; a rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, frame_table, grid_table):
        ctx.save_for_backward(frame_table, grid_table)
        return torch.ops.echo_ext.rope_rotate(x, frame_table, grid_table)

    @staticmethod
    def backward(ctx, grad):
        back = torch.tensor([1.0, -1.0], device=grad.device)
        frame, grid = (table * back for table in ctx.saved_tensors)
        return rope_rotate_ref(grad, frame, grid), None, None


register(
    _LIB,
    "rope_rotate",
    kernel=_kernel,
    cpu=rope_rotate_ref,
    fake=lambda x, frame_table, grid_table: x.new_empty(x.shape),
)
