"""What a block's first step in every layer costs: normalise, rotate, write into the ring; reference and kernel."""

import pytest
import torch

import echo_ext
from echo_ext._dispatch import why_not_kernel
from echo_ext.ring import ring_append
from echo_ext.rope import frame_table, grid_table

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# A block of three frames into a ring of nine: (B, F, rows, columns, ring slots, H, d).
GEOMETRIES = {"official": (1, 3, 30, 52, 9, 12, 128), "tiny": (1, 3, 4, 4, 9, 2, 64)}


def shape_of(geometry, backend):
    """Shape of a geometry, or a skip that says why it can't be timed here."""
    if geometry == "official" and not GPU:
        pytest.skip(f"official is for GPUs: {echo_ext.build_info()['why_no_kernels']}")
    if backend == "kernel" and (reason := why_not_kernel("ring_append", torch.empty(0, device=DEVICE), "q")):
        pytest.skip(f"no ring_append kernel here: {reason}")
    return GEOMETRIES[geometry]


@pytest.mark.parametrize("backend", ["reference", "auto", "kernel"])
@pytest.mark.parametrize("layer", ["any", "last"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_ring_append(bench, geometry, layer, backend):
    B, F, rows, columns, slots, H, d = shape_of(geometry, backend)
    tokens = rows * columns

    def draw(frames):
        return torch.randn(B, frames * tokens, H, d, device=DEVICE).to(DTYPE)

    q, k, v = draw(F), draw(F), draw(F)
    weight = torch.ones(H * d, device=DEVICE, dtype=DTYPE)
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ids = range(slots - 1, slots - 1 + F)  # wraps past the last slot
    moved = (6 + (layer == "last")) * q.numel() * q.element_size()
    bench(
        ring_append,
        q,
        k,
        v,
        q_weight=weight,
        k_weight=weight,
        frame_table=frame_table(ids, d, device=DEVICE),
        grid_table=grid_table(cells[:, 0], cells[:, 1], d, device=DEVICE),
        slots=torch.tensor([[i % slots for i in ids]], device=DEVICE),
        ring_k=draw(slots),
        ring_v=draw(slots),
        ring_raw=draw(slots) if layer == "last" else None,
        backend=backend,
        moved=moved,
        flops=2 * 7 * q.numel(),
    )
