"""Attention of one block over sink, memory and ring: reference and kernel, before and after ids saturate."""

import pytest
import torch

import echo_ext
from echo_ext.attention import _why_not_kernel, frame_shift, stream_attention

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# Queries and keys of three frames, a ring of nine: (B, Tq, (sink, memory, ring), H, d).
GEOMETRIES = {
    "official": (1, 4680, (4680, 4680, 14040), 12, 128),
    "tiny": (1, 48, (48, 48, 144), 2, 64),
}


def shape_of(geometry, backend):
    """Shape of a geometry, or a skip that says why it can't be timed here."""
    if geometry == "official" and not GPU:
        pytest.skip(f"official is for GPUs: {echo_ext.build_info()['why_no_kernels']}")
    if backend == "kernel" and (reason := _why_not_kernel(torch.empty(0, device=DEVICE, dtype=DTYPE))):
        pytest.skip(f"no stream_attention kernel here: {reason}")
    return GEOMETRIES[geometry]


@pytest.mark.parametrize("backend", ["reference", "auto", "kernel"])
@pytest.mark.parametrize("ids", ["first", "saturated"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_stream_attention(bench, geometry, ids, backend):
    B, Tq, (sink, memory, ring), H, d = shape_of(geometry, backend)

    def draw(tokens):
        return torch.randn(B, tokens, H, d, device=DEVICE).to(DTYPE)

    q, keys, values = draw(Tq), draw(sink + ring), draw(sink + ring)
    if ids == "saturated":  # the query is turned for sink and memory
        held = {"sink": (keys[:, :sink], values[:, :sink]), "ring": (keys[:, sink:], values[:, sink:])}
        shift = frame_shift(18, 345_600, d, device=DEVICE)
    else:  # one frame of reference: sink and ring are one run of slots
        held, shift = {"ring": (keys, values)}, None
    held["memory"] = draw(memory), draw(memory)
    tokens = sink + memory + ring
    moved = 2 * (q.numel() + B * tokens * H * d) * q.element_size()
    bench(stream_attention, q, **held, shift=shift, backend=backend, moved=moved, flops=4 * B * H * Tq * tokens * d)
