"""What modulation costs around each layer: norm, residual, and both at once; reference and the machine's kernel."""

import pytest
import torch

import echo_ext
from echo_ext import _cpu
from echo_ext._dispatch import why_not_kernel
from echo_ext.norm import gated_add, gated_modulate, modulate

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
GEOMETRIES = {"official": (1, 3, 1560, 1536), "tiny": (1, 3, 16, 128)}  # (B, F, T_f, D) of a block of three frames
# Each op with its tensors of vectors and how often a token's bytes cross the bus.
OPS = {
    "modulate": (modulate, "", ("shift", "scale"), 2),
    "gated_add": (gated_add, "y", ("gate",), 3),
    "gated_modulate": (gated_modulate, "y", ("gate", "shift", "scale"), 4),
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_norm(bench, geometry, op, backend):
    if geometry == "official" and not GPU:
        pytest.skip(f"official is for GPUs: {echo_ext.build_info()['why_no_kernels']}")
    B, F, T, D = GEOMETRIES[geometry]
    function, second, vectors, times = OPS[op]

    def draw(*shape):
        return torch.randn(shape, device=DEVICE).to(DTYPE)

    args = [draw(B, F * T, D) for _ in "x" + second] + [draw(B, F, 1, D) for _ in vectors]
    reason = why_not_kernel(op, args[0], "x") if GPU else _cpu.why_not_norm(*args)
    if backend == "auto" and reason:
        pytest.skip(f"no {op} kernel here: {reason}")
    moved = times * args[0].numel() * args[0].element_size()
    bench(function, *args, backend=backend, moved=moved, flops=8 * args[0].numel())
