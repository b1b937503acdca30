"""Frames a second at a geometry with random weights: generator alone, each decoder alone, both beside each other.

    python bench/end_to_end.py --device cuda --dtype bfloat16 --out end_to_end.json
    python bench/end_to_end.py --config small.json --blocks 3      # any geometry, also on a CPU

A block is timed from its first call to its last frame on the host, with a synchronised device. The Wan VAE needs
diffusers; without it that row says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from clock import idle
from echo_infinity.codec import to_uint8
from echo_infinity.config import EchoConfig, preset
from echo_infinity.extras import MissingExtraError, library
from echo_infinity.lane import Lane
from echo_infinity.sampler import BlockSampler
from echo_infinity.taehv import TinyConfig, TinyDecoder
from echo_infinity.wanvae import WanVae
from full_geometry import build

WARM = 8  # blocks: the graphs of a full window's slots are captured by then


def decoders(config: EchoConfig, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Decoders with random weights by name; a string says why one is missing."""
    channels = config.model.latent_channels
    found: dict[str, Any] = {"tiny": TinyDecoder(TinyConfig(latent_channels=channels)).to(device, dtype).eval()}
    try:
        diffusers = library("diffusers", "the Wan VAE")
    except MissingExtraError as error:
        return found | {"wan": str(error)}
    plain = {} if channels == 16 else {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    vae = diffusers.AutoencoderKLWan(z_dim=channels, **plain)
    return found | {"wan": WanVae(vae.to(device, dtype)).to(device).eval()}


def seconds(work: Callable[[], object], blocks: int, device: str) -> list[float]:
    """Times of ``blocks`` runs, each with the device idle before and after."""
    taken = []
    for _ in range(blocks):
        idle(device)
        begun = time.perf_counter()
        work()
        idle(device)
        taken.append(time.perf_counter() - begun)
    return taken


def beside(sampler: BlockSampler, codec: Any, blocks: int, device: str) -> float:
    """Seconds a block with decoding beside the next block, as a recording does it."""
    lane, state = Lane(torch.device(device)), None

    def decode(latents: torch.Tensor) -> None:
        nonlocal state
        with torch.inference_mode(), lane.use(latents):
            pixels, state = codec.decode(latents, state)
            to_uint8(pixels).cpu()

    idle(device)
    begun = time.perf_counter()
    with ThreadPoolExecutor(1) as worker:
        job = None
        for _ in range(blocks):
            latents = sampler.next_block().clone()
            lane.made()
            if job is not None:
                job.result()
            job = worker.submit(decode, latents)
        if job is not None:
            job.result()  # or what it raised would be lost
    idle(device)
    return (time.perf_counter() - begun) / blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="wan2.1-1.3b")
    parser.add_argument("--config", type=Path, help="a config.json instead")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = preset(args.preset) if args.config is None else EchoConfig.from_json(args.config.read_text())
    dtype, frames = getattr(torch, args.dtype), 4 * config.window.frames_per_block
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device != "cpu" else torch.backends.cpu.get_cpu_capability(),
        "geometry": config.name,
        "dtype": args.dtype,
        "blocks": args.blocks,
        "pixel_frames_a_block": frames,
    }
    with torch.inference_mode():
        sampler = build(config, dtype, args.device, graphs=None)
        for _ in range(WARM if args.device != "cpu" else 1):
            latents = sampler.next_block()
        alone = seconds(sampler.next_block, args.blocks, args.device)
        report["generator"] = {"fps": frames / statistics.median(alone), "seconds": alone}
        for name, codec in decoders(config, dtype, args.device).items():
            if isinstance(codec, str):
                report[name] = codec
                continue
            state = codec.decode(latents)[1]
            taken = seconds(lambda c=codec, s=state: c.decode(latents, s)[0].cpu(), args.blocks, args.device)
            together = beside(sampler, codec, args.blocks, args.device)
            report[name] = {
                "decoder_fps": frames / statistics.median(taken),
                "seconds": taken,
                "end_to_end_fps": frames / together,
            }
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
