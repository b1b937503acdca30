"""One block of a geometry with random weights, a full window and memory, and the process's peak beside `plan`'s figure.

    python bench/full_geometry.py                        # wan2.1-1.3b, bfloat16, all denoising steps
    python bench/full_geometry.py --steps 1 --layers 2   # the same block, less of it

On a CPU a pass at the official geometry is 32 TFLOP. Peak memory depends on the geometry and not on the steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from clock import idle
from echo_infinity.budget import Choice, items
from echo_infinity.config import EchoConfig, preset
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler
from echo_infinity.taehv import TinyConfig, TinyDecoder


def build(config: EchoConfig, dtype: torch.dtype, device: str, graphs: bool | None = False) -> BlockSampler:
    """A stream at frame 18 whose window is full and whose memory has been written."""
    with torch.device("meta"):
        parts = [CausalDiT(config.model), EvolvingMemory(config.memory)]
    for part in parts:
        for name, parameter in list(part.named_parameters()):
            owner = part.get_submodule(name.rpartition(".")[0])
            x = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02)
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(x, requires_grad=False))
    model, memory = (part.eval() for part in parts)
    embeddings = torch.randn(1, config.model.text_tokens, config.model.text_width, device=device) * 0.1
    sampler = BlockSampler(
        Generator(config, model, memory), model.encode_text(embeddings), counter_noise(0), graphs=graphs
    )
    for x in sampler.cache.tensors().values():
        x.normal_(0, 0.02)
    sampler.frame = config.window.p_max - config.window.frames_per_block
    sampler.memory.writes = 1
    return sampler


def peak(device: str) -> int:
    """Most bytes that the process, or the GPU, has held; on a GPU with the libraries' own, and other programs'."""
    if device != "cpu":
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if status.exists():  # the other source counts what the parent held when it forked
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="wan2.1-1.3b")
    parser.add_argument("--config", help="a config.json instead")
    parser.add_argument("--layers", type=int, help="fewer than the preset's")
    parser.add_argument("--steps", type=int, help="fewer than the preset's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decoder", choices=["none", "tiny"], default="none", help="decode the block too")
    args = parser.parse_args()
    config = preset(args.preset) if args.config is None else EchoConfig.from_json(Path(args.config).read_text())
    if args.layers:
        config = replace(config, model=replace(config.model, layers=args.layers))
    if args.steps:
        config = replace(config, sampler=replace(config.sampler, steps=config.sampler.steps[: args.steps]))
    dtype = getattr(torch, args.dtype)
    plan = items(
        config,
        Choice(dtype=args.dtype, text="file", decoder=args.decoder, decoder_dtype=args.dtype, prompts=1),
        args.device,
    )
    del plan["more work at a prompt switch"]
    with torch.inference_mode():
        sampler = build(config, dtype, args.device)
        if args.decoder == "tiny":
            decoder = TinyDecoder(TinyConfig(config.model.latent_channels)).to(args.device, dtype).eval()
        idle(args.device)
        begun = time.perf_counter()
        latents = sampler.next_block()
        idle(args.device)
        seconds = time.perf_counter() - begun
        if args.decoder == "tiny":
            state = None
            for _ in range(2):  # from the second block on the old state is there beside the new
                _, state = decoder.decode(latents, state)
    measured, planned = peak(args.device), sum(plan.values())
    report = {
        "seconds": round(seconds, 1),
        "finite": bool(torch.isfinite(latents).all()),
        "measured_mib": measured >> 20,
        "planned_mib": planned >> 20,
        "measured_over_planned": round(measured / planned, 3),
        "plan_mib": {name: size >> 20 for name, size in plan.items()},
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
