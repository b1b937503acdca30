"""``echo-infinity convert``: checkpoints of other layouts into one folder that every command opens."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from echo_infinity.checkpoints.convert import Settings, Sources, convert
from echo_infinity.checkpoints.shards import Progress
from echo_infinity.config import EchoConfig, preset

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity convert``."""
    parser.add_argument(
        "weights",
        type=Path,
        nargs="*",
        metavar="CHECKPOINT",
        help="a .pt, .safetensors, index or folder with the generator; others with its LoRA or memory",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the model folder to make")
    parser.add_argument("--preset", default="wan2.1-1.3b", help="geometry (default wan2.1-1.3b)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="geometry from a config.json instead")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting, such as memory.normalise_keys=true or window.relative=false; may be repeated",
    )
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the trained weights, not their average")
    parser.add_argument("--dtype", choices=DTYPES, help="of the generator as written (default as it is)")
    parser.add_argument("--lora-alpha", type=float, metavar="A", help="scale of the LoRA is A / rank (default 1)")
    parser.add_argument("--text", type=Path, metavar="PATH", help="UMT5 encoder: original .pth, or a folder")
    parser.add_argument("--text-dtype", choices=DTYPES, default="bfloat16", help="of the encoder as written")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="of the encoder (default beside it)")
    parser.add_argument("--vae", type=Path, metavar="PATH", help="Wan VAE: original .pth, or a diffusers folder")
    parser.add_argument("--tiny-decoder", type=Path, metavar="FILE", help="tiny autoencoder in the TAEHV layout")
    parser.add_argument("--shard-size", type=float, default=2.0, metavar="GB", help="most of a file (default 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder, or parts in it")


def run(args: argparse.Namespace) -> int:
    """Convert as the options say and return the exit code."""
    config = _config(args)
    if args.shard_size <= 0:
        raise ValueError(f"--shard-size must be positive, got {args.shard_size}")
    sources = Sources(args.weights, args.text, args.tokenizer, args.vae, args.tiny_decoder)
    settings = Settings(
        ema=args.ema,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        text_dtype=getattr(torch, args.text_dtype),
        lora_alpha=args.lora_alpha,
        shard_bytes=int(args.shard_size * 1e9),
        overwrite=args.overwrite,
    )
    with _Bar() as bar:
        notes = convert(sources, args.output, config, settings, progress=bar)
    for note in notes:
        tqdm.write(note)
    tqdm.write(f"{args.output}: {sum(p.stat().st_size for p in args.output.rglob('*') if p.is_file()) / 1e9:.2f} GB")
    return 0


class _Bar(Progress):
    """A terminal's progress bar; nothing where the output is a file."""

    def __enter__(self) -> _Bar:
        self._bar = tqdm(total=0, unit="B", unit_scale=True, unit_divisor=1000, disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def expect(self, nbytes: int) -> None:
        """More to write."""
        self._bar.total = (self._bar.total or 0) + nbytes
        self._bar.refresh()

    def done(self, nbytes: int) -> None:
        """Written."""
        self._bar.update(nbytes)


def _config(args: argparse.Namespace) -> EchoConfig:
    config = preset(args.preset) if args.config is None else EchoConfig.from_json(args.config.read_text())
    data = dataclasses.asdict(config)
    for change in args.set:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {change!r}")
        _set(data, name, _value(value))
    return EchoConfig.from_json(json.dumps(data))


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        data = data.get(group) or {}
    if last not in data:
        raise ValueError(f"--set {name}: no such setting; beside it there are: {', '.join(data) or 'none'}")
    data[last] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
