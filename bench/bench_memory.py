"""The memory's write and its two ops: reference and kernel, over one eviction of three frames."""

import pytest
import torch
from echo_infinity.memory import EvolvingMemory, MemoryConfig

import echo_ext
from echo_ext._dispatch import why_not_kernel
from echo_ext.gate import gate_blend
from echo_ext.memory import memory_xattn

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# Three memory frames read three evicted ones: (B, Tq, Tk, H, d).
GEOMETRIES = {"official": (1, 4680, 4680, 12, 128), "tiny": (1, 48, 48, 2, 64)}


def shape_of(geometry, backend, op):
    """Shape of a geometry, or a skip that says why it can't be timed here."""
    if geometry == "official" and not GPU:
        pytest.skip(f"official is for GPUs: {echo_ext.build_info()['why_no_kernels']}")
    kernel = {"memory_xattn": "memory_query"}.get(op, op)
    if backend == "kernel" and (reason := why_not_kernel(kernel, torch.empty(0, device=DEVICE), "x")):
        pytest.skip(f"no {op} kernel here: {reason}")
    return GEOMETRIES[geometry]


def draw(*shape):
    return torch.randn(shape, device=DEVICE).to(DTYPE)


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("segments", [1, 2], ids=["one", "wrapped"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_memory_xattn(bench, geometry, segments, backend):
    B, Tq, Tk, H, d = shape_of(geometry, backend, "memory_xattn")
    q, k, v, norm = draw(B, Tq, H, d), draw(B, Tk, H, d), draw(B, Tk, H, d), draw(H * d)
    cuts = [Tk] if segments == 1 else [Tk // 3, Tk - Tk // 3]
    pairs = list(zip(k.split(cuts, dim=1), v.split(cuts, dim=1), strict=True))
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    bench(memory_xattn, q, pairs, norm_weight=norm, backend=backend, moved=moved, flops=4 * B * H * Tq * Tk * d)


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_gate_blend(bench, geometry, backend):
    B, T, _, H, d = shape_of(geometry, backend, "gate_blend")
    D = H * d
    state, proposal, weight, bias = draw(B, T, D), draw(B, T, D), draw(D, 2 * D), draw(D)
    moved = (3 * state.numel() + weight.numel()) * state.element_size()
    bench(gate_blend, state, proposal, weight, bias, backend=backend, moved=moved, flops=4 * B * T * D * D)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_memory_write(bench, geometry):
    """A whole write and read-out, as the stream calls them once a block."""
    B, Tq, Tk, H, d = shape_of(geometry, "auto", "memory_xattn")
    D = H * d
    config = MemoryConfig(width=D, heads=H, frames=3, tokens_per_frame=Tq // 3)
    memory = EvolvingMemory(config).to(DEVICE, DTYPE)
    k, v = draw(B, Tk, H, d), draw(B, Tk, H, d)
    weights = sum(x.numel() for x in memory.parameters()) - memory.query_init.numel()
    moved = (weights + 4 * B * Tq * D + 2 * k.numel()) * k.element_size()
    linear = B * Tq * D * D * (config.layers * 10 + 6)  # q, o, FFN; connector, gate, K and V: in multiply-adds
    flops = 2 * linear + config.layers * 4 * B * Tq * Tk * D

    def once(state, k, v):
        return memory.read(memory.write(state, [(k, v)]))

    bench(once, memory.start(B), k, v, moved=moved, flops=flops)
