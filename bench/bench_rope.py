"""The rotation of one block's queries: reference and kernel."""

import pytest
import torch

import echo_ext
from echo_ext._dispatch import why_not_kernel
from echo_ext.rope import frame_table, grid_table, rope_rotate

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# A block of three frames: (B, F, rows, columns, H, d).
GEOMETRIES = {"official": (1, 3, 30, 52, 12, 128), "tiny": (1, 3, 4, 4, 2, 64)}


def shape_of(geometry, backend):
    """Shape of a geometry, or a skip that says why it can't be timed here."""
    if geometry == "official" and not GPU:
        pytest.skip(f"official is for GPUs: {echo_ext.build_info()['why_no_kernels']}")
    if backend == "kernel" and (reason := why_not_kernel("rope_rotate", torch.empty(0, device=DEVICE), "x")):
        pytest.skip(f"no rope_rotate kernel here: {reason}")
    return GEOMETRIES[geometry]


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_rope_rotate(bench, geometry, backend):
    B, F, rows, columns, H, d = shape_of(geometry, backend)
    x = torch.randn(B, F * rows * columns, H, d, device=DEVICE).to(DTYPE)
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    tables = frame_table(range(18, 18 + F), d, device=DEVICE), grid_table(cells[:, 0], cells[:, 1], d, device=DEVICE)
    moved = 2 * x.numel() * x.element_size() + sum(table.nbytes for table in tables)
    bench(rope_rotate, x, *tables, backend=backend, moved=moved, flops=3 * x.numel())
