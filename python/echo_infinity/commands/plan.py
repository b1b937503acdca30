"""``echo-infinity plan``: the memory that a model takes, by arithmetic, and the settings that fit a GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from echo_infinity.budget import DTYPES, GIB, Choice, capacity, choices, items, pick
from echo_infinity.config import EchoConfig, preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity plan``."""
    parser.add_argument("--preset", default="wan2.1-1.3b", help="geometry (default wan2.1-1.3b)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="geometry from a config.json instead")
    parser.add_argument("--size", metavar="WxH", help="another size of the video in pixels, such as 1280x720")
    parser.add_argument("--gpu", metavar="SIZE", help="memory of the GPU, such as 24GB: picks the settings")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of generator and cache")
    parser.add_argument("--weights", choices=["full", "fp8"], default="full", help="linear layers")
    parser.add_argument("--kv", choices=["full", "fp8"], default="full", help="cached keys and values")
    parser.add_argument("--text", choices=["cuda", "cpu", "file"], default="cuda", help="where prompts are encoded")
    parser.add_argument("--decoder", choices=["own", "wan", "tiny", "none"], help="default wan, for tiny its own")
    parser.add_argument("--decoder-dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--streams", type=int, default=1, metavar="N", help="that run at once")


def run(args: argparse.Namespace) -> int:
    """Print the plan; return 0 if it fits, 1 if nothing does."""
    lines, fits = plan(args)
    print("\n".join(lines))  # noqa: T201
    return 0 if fits else 1


def plan(args: argparse.Namespace) -> tuple[list[str], bool]:
    """The report, and whether a choice fits."""
    config = preset(args.preset) if args.config is None else EchoConfig.from_json(args.config.read_text())
    if args.size is not None:
        config = _resize(config, args.size)
    decoder = args.decoder or ("own" if config.model.latent_channels != 16 else "wan")
    text = "file" if decoder == "own" else args.text
    first = Choice(args.dtype, args.weights, args.kv, text, decoder, args.decoder_dtype, args.streams)
    if args.gpu is None:
        return _table(config, first), True
    room = capacity(args.gpu)
    chosen = pick(config, room, first)
    if chosen is None:
        *_, least = choices(first)
        return [
            *_table(config, least),
            f"does not fit {args.gpu}, whatever the settings: lower --size or --streams",
        ], False
    spare = room - sum(items(config, chosen).values())
    return [
        *_table(config, chosen),
        f"fits {args.gpu} with {spare / GIB:.1f} GiB to spare{_where(chosen)}; run with:",
        f"  echo-infinity generate ... {_options(chosen)}",
    ], True


def _table(config: EchoConfig, choice: Choice) -> list[str]:
    found = items(config, choice)
    width, height = config.latent_columns * 8, config.latent_rows * 8
    lines = [f"{config.name}, {width} x {height} pixels, {choice.streams} stream{'s' if choice.streams > 1 else ''}"]
    lines += [f"  {name:32} {size / GIB:8.3f} GiB" for name, size in found.items()]
    return [*lines, f"  {'together':32} {sum(found.values()) / GIB:8.3f} GiB"]


def _where(choice: Choice) -> str:
    return {"cpu": ", prompts encoded on the CPU (10.6 GiB of main memory)", "file": ", prompts from a file"}.get(
        choice.text, ""
    )


def _options(choice: Choice) -> str:
    words = [f"--dtype {choice.dtype}"]
    words += ["--text-device cpu"] if choice.text == "cpu" else []
    words += ["--text FILE"] if choice.text == "file" and choice.decoder != "own" else []
    words += [f"--decoder {choice.decoder}"] if choice.decoder in ("wan", "tiny") else []
    words += [f"--decoder-dtype {choice.decoder_dtype}"] if choice.decoder in ("wan", "tiny") else []
    words += [f"--{name} fp8" for name in ("weights", "kv") if getattr(choice, name) == "fp8"]
    return " ".join(words)


def _resize(config: EchoConfig, size: str) -> EchoConfig:
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit()) or int(width) % 16 or int(height) % 16:
        raise ValueError(f"--size is WIDTHxHEIGHT in multiples of 16, got {size!r}")
    rows, columns = int(height) // 8, int(width) // 8
    memory = config.memory
    if memory is not None:
        grid = rows // config.model.patch[1] * (columns // config.model.patch[2])
        memory = replace(memory, tokens_per_frame=max(1, memory.tokens_per_frame * grid // config.tokens_per_frame))
    return replace(config, latent_rows=rows, latent_columns=columns, memory=memory)
