"""One steady block of the engine: denoising calls, memory write, context pass; random weights."""

import importlib
import time
import warnings
from pathlib import Path

import pytest
import torch
from echo_infinity.config import preset
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WARM_BLOCKS = 7  # fills the window and saturates the ids


@pytest.fixture
def config(geometry, monkeypatch):
    """The preset of that name, or the naive loop's own geometry."""
    if geometry != "baseline":
        return preset(geometry)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("baseline").GEOMETRIES["baseline"]


def flops_of(config):
    """Floating-point operations of the DiT's products and attention in one block, a steady one."""
    m, w = config.model, config.window
    tokens = w.frames_per_block * config.tokens_per_frame
    memory = config.memory.tokens
    keys = w.window_frames * config.tokens_per_frame + memory
    layer = 2 * tokens * (6 * m.width**2 + 2 * m.width * m.ffn)  # q k v o twice less the text's k v; up and down
    layer += 4 * tokens * (keys + m.text_tokens) * m.width
    return (len(config.sampler.steps) + 1) * m.layers * layer


def sampler_of(config, dtype, graphs=False):
    model = CausalDiT(config.model).to(DEVICE, dtype).eval()
    memory = EvolvingMemory(config.memory).to(DEVICE, dtype)
    text = model.encode_text(torch.randn(1, config.model.text_tokens, config.model.text_width, device=DEVICE))
    sampler = BlockSampler(Generator(config, model, memory), text, counter_noise(0), graphs=graphs)
    block = sampler.window[:, : config.window.frames_per_block]
    for _ in range(WARM_BLOCKS):
        sampler.observe(torch.randn_like(block))
    return sampler


def host_figures(sampler):
    """Of steady blocks on a GPU: time until the call returns, waits for the device, and memory at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    times = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            begun = time.perf_counter()
            sampler.next_block()
            times.append(time.perf_counter() - begun)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
    torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(w.message) for w in caught)
    return {"host_ms": 1e3 * min(times), "waits": waits / 3, "peak_GiB": torch.cuda.max_memory_allocated() / 2**30}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("geometry", ["tiny", "baseline", "wan2.1-1.3b"])
@pytest.mark.parametrize("mode", ["calls", "graphs"])
@torch.inference_mode()
def bench_block(bench, benchmark, config, geometry, dtype, mode):
    if geometry == "wan2.1-1.3b" and not GPU:
        pytest.skip("the official geometry is for GPUs; this torch sees none")
    if mode == "graphs" and not GPU:
        pytest.skip("CUDA graphs need a GPU; this torch sees none")
    if geometry == "wan2.1-1.3b" and dtype is torch.float32:
        pytest.skip("the official model runs in bfloat16")
    sampler = sampler_of(config, dtype, graphs=mode == "graphs")
    for _ in range(6 if mode == "graphs" else 0):  # every key is seen once, then captured
        sampler.next_block()
    moved = sum(x.numel() * x.element_size() for x in sampler.cache.tensors().values())  # every key and value, once
    calls = len(config.sampler.steps) + 1
    rounds = 3 if geometry == "baseline" and not GPU else 20
    if GPU:
        benchmark.extra_info.update(host_figures(sampler))
    bench(sampler.next_block, moved=calls * moved, flops=flops_of(config), rounds=rounds)
    if benchmark.stats:
        frames = 4 * config.window.frames_per_block
        benchmark.extra_info["frames/s"] = frames / benchmark.stats["median"]
