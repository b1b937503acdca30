"""``echo-infinity info``: what is installed, what was built, what can be generated."""

from __future__ import annotations

import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch

import echo_ext
from echo_infinity.codec import SPACE_STRIDE
from echo_infinity.config import PRESETS, EchoConfig


def lines() -> list[str]:
    """Return the report, a line each."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "av", "numpy"))
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    report = [f"echo-infinity {echo_ext.__version__}, Python {platform.python_version()}, {packages}", f"cpu: {cpu}"]
    report += [f"{name}: {value}" for name, value in echo_ext.build_info().items()]
    weights = Path(str(files("echo_infinity"))) / "weights"
    bundled = {folder.parent.name for folder in weights.glob("*/config.json")}
    report.append("presets:")
    return report + [f"  {name}: {_describe(config, name in bundled)}" for name, config in PRESETS.items()]


def _describe(config: EchoConfig, bundled: bool) -> str:
    m, w = config.model, config.window
    memory = "no memory" if config.memory is None else f"{config.memory.tokens} memory tokens"
    width, height = config.latent_columns * SPACE_STRIDE, config.latent_rows * SPACE_STRIDE
    return (
        f"{width} x {height} pixels at {config.fps} frames/s, "
        f"{m.layers} layers x {m.width}, window {w.window_frames} latent frames, {memory}, "
        f"{len(config.sampler.steps)} steps; weights {'bundled' if bundled else 'not bundled'}"
    )
