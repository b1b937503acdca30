"""The command ``echo-infinity``: parse, call, print; heavy modules are imported by the commands that need them."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from echo_infinity.commands import UserError

_LENGTHS = {"seconds": float, "minutes": float, "hours": float, "frames": int}
# Commands whose options live in the module that does the work.
_DELEGATED = {
    "train": {
        "codec": "echo_infinity.training.codec",
        "clips": "echo_infinity.training.clips",
        "flow": "echo_infinity.training.flow",
        "init": "echo_infinity.training.init",
        "distill": "echo_infinity.training.distill",
        "long": "echo_infinity.training.long",
        "average": "echo_infinity.training.average",
        "ablate": "echo_infinity.training.ablate",
    },
}
# The same without a second word.
_MODULES = {
    "eval": ("echo_infinity.evaluation.command", "measure recall, drift, prompt adherence and cost"),
    "inspect": ("echo_infinity.inspection.command", "draw what the memory reads and what reads the memory"),
    "convert": ("echo_infinity.commands.convert", "make a model folder of other people's checkpoints"),
    "embed": ("echo_infinity.commands.embed", "compute prompts' embeddings, so that a run needs no text encoder"),
    "plan": ("echo_infinity.commands.plan", "say what memory a model takes, and what fits a GPU"),
}
_HELP = {"train": "train a part of the bundled model"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 ok, 130 interrupted, 2 a request that can't be served, 1 otherwise."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            if words and words[0] in _MODULES:
                return _run_module(_MODULES[words[0]][0], words[:1], words[1:])
            args = _parser().parse_args(words)
            return args.handler(args)
    except UserError as error:
        print(f"echo-infinity: error: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("echo-infinity: interrupted", file=sys.stderr)
        return 130


def _generate(args: argparse.Namespace) -> int:
    from echo_infinity.commands import generate

    return generate.run(args)


def _info(args: argparse.Namespace) -> int:
    from echo_infinity.commands import info

    print("\n".join(info.lines()))
    return 0


def _delegate(args: argparse.Namespace) -> int:
    return _run_module(_DELEGATED[args.command][args.what], [args.command, args.what], args.rest)


def _run_module(name: str, command: list[str], rest: Sequence[str]) -> int:
    """Parse the rest with the options of the module that does the work, and run it."""
    module = importlib.import_module(name)
    parser = _Parser(prog=f"echo-infinity {' '.join(command)}", description=module.__doc__)
    module.add_arguments(parser)
    given = parser.parse_args(rest)
    try:
        return int(module.run(given) or 0)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="echo-infinity", description="Endless text-to-video streams at constant cost.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _add_generate(commands.add_parser("generate", help="stream a prompt into a video"))
    info = commands.add_parser("info", help="say what is installed, built and bundled")
    info.set_defaults(handler=_info)
    for name, (_, what) in _MODULES.items():
        commands.add_parser(name, help=what)
    for name, modules in _DELEGATED.items():
        command = commands.add_parser(name, help=_HELP[name])
        command.add_argument("what", choices=list(modules))
        command.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options; --help lists them")
        command.set_defaults(handler=_delegate)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="what to show, of each stream; with --resume, from there on")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="lines '[30s] prompt'; '[30s] | prompt' cuts")
    parser.add_argument("--image", type=Path, action="append", metavar="FILE", help="first frame, where the model can")
    length = parser.add_mutually_exclusive_group()
    for name, kind in _LENGTHS.items():
        length.add_argument(f"--{name}", type=kind, metavar="N", help="length of the whole video")
    length.add_argument("--endless", action="store_true", help="until Ctrl-C")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-o", "--output", metavar="PATH", help="an .mp4, or a folder or shot_%%06d.png for PNG files")
    output.add_argument("--no-video", action="store_true", help="generate and count only")
    parser.add_argument("--overwrite", action="store_true", help="replace a video and its state that are there already")
    parser.add_argument("--seed", type=_seeds, metavar="N[,N...]", help="of the noise (default 0), of each stream")
    parser.add_argument("--model", help="a bundled model or a checkpoint's folder (default tiny, or as saved)")
    parser.add_argument("--text", metavar="PATH", help="text encoder's folder, or a file made by 'embed'")
    parser.add_argument("--text-keep", choices=["loaded", "cpu", "freed"], help="the encoder, after a prompt")
    parser.add_argument("--text-device", metavar="DEVICE", help="where the encoder computes (default the model's)")
    parser.add_argument("--decoder", choices=["own", "wan", "tiny"], help="default the first that the model has")
    parser.add_argument("--decoder-dtype", choices=["float32", "bfloat16", "float16"], help="default float32")
    parser.add_argument("--weights", choices=["full", "fp8"], help="linear layers as they are, or in e4m3")
    parser.add_argument("--kv", choices=["full", "fp8"], help="cached keys and values as they are, or in e4m3")
    parser.add_argument("--memory", choices=["on", "off", "frozen"], help="evolving memory (default on)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32, or as saved")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default cuda where there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: what suits the model)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="save the stream here, at the end too")
    parser.add_argument("--autosave", type=float, metavar="SECONDS", help="save this often; 0 after every block")
    parser.add_argument("--resume", type=Path, action="append", metavar="FILE", help="go on with a saved stream")
    parser.add_argument("--raw-hashes", type=Path, metavar="FILE", help='append "block sha256" of each raw block')
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(handler=_generate)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from error


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"echo-infinity: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
