"""``echo-infinity embed``: prompts' embeddings into a file that stands in for the text encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from echo_infinity.config import EchoConfig
from echo_infinity.parts import TEXT_FOLDER
from echo_infinity.umt5 import Umt5Text, cache_folder
from echo_infinity.weights import CONFIG, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity embed``."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what will be shown")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model that will read them")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="the encoder (default the model's own)")
    parser.add_argument("--device", default="cpu", help="where to compute (default cpu)")


def run(args: argparse.Namespace) -> int:
    """Embed as the options say and return the exit code."""
    folder = find(args.model)
    config = EchoConfig.from_json((folder / CONFIG).read_text()).model
    source = args.text or folder / TEXT_FOLDER
    text = Umt5Text(source, config.text_tokens, config.text_width, device=args.device, cache=cache_folder())
    text.save(args.prompts, args.output)
    return 0
