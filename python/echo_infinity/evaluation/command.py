"""``echo-infinity eval``: measure a model under a policy, and put every run of a folder into one table.

Each measure keeps what it has in OUT/NAME, so the same command goes on after a kill, or with more rollouts or hours.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from echo_infinity.evaluation import plots, report
from echo_infinity.evaluation.cost import CostTest, Timing
from echo_infinity.evaluation.drift import Drift, DriftTest
from echo_infinity.evaluation.journal import Journal
from echo_infinity.evaluation.perceptual import Perceptual, PerceptualTest
from echo_infinity.evaluation.prompt import Prompt, PromptTest
from echo_infinity.evaluation.real import load_reference, real_clips, real_worlds
from echo_infinity.evaluation.recall import MODES, Recall, RecallTest, keeps_memory
from echo_infinity.policies import POLICIES, find_policy
from echo_infinity.weights import Checkpoint, load_checkpoint
from echo_infinity.worlds.grammar import parse

_USUAL = ("recall", "drift", "prompt", "cost")
_CHOICES = (*_USUAL, "vbench", "report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity eval``."""
    parser.add_argument(
        "measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(_CHOICES)}; default {' '.join(_USUAL)}"
    )
    parser.add_argument("--model", default="tiny", help="bundled model or folder")
    parser.add_argument("--policy", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--name", help="of the run (default MODEL-POLICY); with one policy only")
    parser.add_argument("--out", type=Path, default=Path("eval"), help="folder of all runs and of the report")
    parser.add_argument("--seed", type=int, default=0, help="of the first rollout; the others count on from it")
    parser.add_argument("--rollouts", type=int, default=256, help="recall: a mode and absence; prompt: in all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["shown", "staged"], help="recall: who made what")
    parser.add_argument("--absences", nargs="+", type=float, default=[1, 2, 4], help="recall: in windows")
    parser.add_argument("--sight", type=int, default=2, help="recall: open blocks before the curtain closes")
    parser.add_argument("--hours", type=float, default=1.0, help="drift: of each stream")
    parser.add_argument("--streams", type=int, default=8, help="drift: seeds")
    parser.add_argument("--real", type=Path, help="drift: folder of real videos instead of the procedural worlds")
    parser.add_argument("--clips", type=int, default=6, help="drift: real worlds of each prompt, a minute each")
    parser.add_argument("--prompts", type=Path, help="drift, vbench: file with a prompt a line")
    parser.add_argument("--seconds", type=float, default=20.0, help="prompt: of video before and after the switch")
    parser.add_argument("--blocks", type=int, default=100, help="cost: blocks timed")
    parser.add_argument("--minutes", type=int, default=4, help="vbench: of each video")
    parser.add_argument("--batch", type=int, default=32, help="rollouts side by side; drift: at most --streams")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--restart", action="store_true", help="forget what these measures have of this run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure, then write and print the report of ``--out``; return the exit code."""
    measures = args.measures or list(_USUAL)
    if unknown := [m for m in measures if m not in _CHOICES]:
        raise ValueError(f"measures are {', '.join(_CHOICES)}, got {', '.join(unknown)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = [m for m in measures if m != "report"]
    if wanted:
        _measure_all(args, wanted)
    runs = report.read_runs(args.out)
    print(report.write(runs, args.out), end="")  # noqa: T201
    if reason := plots.write_plots(runs, args.out):
        _say(reason)
    _say(f"report.md, report.json and plots are in {args.out}")
    return 0


def _measure_all(args: argparse.Namespace, measures: list[str]) -> None:
    checkpoint = load_checkpoint(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    config = checkpoint.config
    policies = args.policy or ["sink" if (config.policy, checkpoint.memory) == ("evolving", None) else config.policy]
    for policy in policies:
        find_policy(policy)
    if args.name and len(policies) > 1:
        raise ValueError(f"--name names one run, got policies {', '.join(policies)}: leave one of them out")
    for policy in policies:
        name = args.name or f"{Path(args.model).name}-{policy}"
        for measure in measures:
            _measure(args, checkpoint, policy, args.out / name, measure)


def _measure(args: argparse.Namespace, checkpoint: Checkpoint, policy: str, folder: Path, measure: str) -> None:
    if args.restart:
        _forget(folder, measure)
    with _bar(args, f"{folder.name}: {measure}") as bar:
        test, judge = _make(args, checkpoint, policy, folder, measure)
        _check_length(checkpoint, policy, measure, judge.blocks())
        settings = {
            "model": args.model,
            "policy": policy,
            "fingerprint": checkpoint.fingerprint,
            "dtype": args.dtype,
            **test.settings(),
        }
        if isinstance(judge, Drift):
            path = _reference(args, checkpoint, judge.test, bar.update)
            settings["reference"] = None if path is None else path.name
            judge.reference = {} if path is None else load_reference(path)
        journal = Journal(folder / f"{measure}.jsonl", settings)
        bar.reset(judge.steps())
        judge.run(journal, bar.update)


def _make(args: argparse.Namespace, checkpoint: Checkpoint, policy: str, folder: Path, measure: str) -> tuple[Any, Any]:
    """The test and its judge."""
    test: Any
    if measure == "recall":
        absences, modes = tuple(args.absences), tuple(args.modes)
        if "swapped" in modes and not keeps_memory(checkpoint, policy):
            _say(f"recall: policy {policy} keeps no memory to swap: mode swapped left out")
            modes = tuple(mode for mode in modes if mode != "swapped")
        test = RecallTest(args.rollouts, absences, modes, args.sight, args.seed, args.batch)
        return test, Recall(checkpoint, policy, test)
    if measure == "prompt":
        test = PromptTest(args.rollouts, args.seconds, args.seed, args.batch)
        return test, Prompt(checkpoint, policy, test)
    if measure == "cost":
        prompts = _prompts(args)
        test = CostTest(args.blocks, prompts[0]) if prompts else CostTest(args.blocks)
        return test, Timing(checkpoint, policy, test)
    if measure == "vbench":
        test = PerceptualTest(_prompts(args) or DriftTest().all_prompts(), args.minutes, args.seed)
        return test, Perceptual(checkpoint, policy, test, folder / "clips")
    minutes = max(1, round(args.hours * 60))
    test = DriftTest(minutes, args.streams, args.seed, _prompts(args), min(args.batch, args.streams))
    return test, Drift(checkpoint, policy, test, None, folder)


def _check_length(checkpoint: Checkpoint, policy: str, measure: str, blocks: int) -> None:
    limit = find_policy(policy).max_frames(checkpoint.config)
    frames = blocks * checkpoint.config.window.frames_per_block
    if limit is not None and frames > limit:
        raise ValueError(
            f"{measure} needs streams of {frames} latent frames, policy {policy} can hold {limit}: ask for shorter ones"
        )


def _reference(
    args: argparse.Namespace, checkpoint: Checkpoint, test: DriftTest, progress: Callable[[int], Any]
) -> Path | None:
    """Where the real clips' figures are; None where the prompts are no worlds' and no folder is given."""
    c = checkpoint.config
    if args.real is not None:
        size = c.latent_rows * 8, c.latent_columns * 8
        return real_clips(checkpoint.codec, args.real, size, c.window.frames_per_block, args.out)
    try:
        for prompt in test.all_prompts():
            parse(prompt)
    except ValueError as error:
        _say(f"drift: no distance to real clips: {error}; --real FOLDER gives some")
        return None
    blocks = max(2, min(test.minutes * 60, 60) * c.fps // (4 * c.window.frames_per_block))
    return real_worlds(checkpoint.codec, test.all_prompts(), args.clips, blocks, args.out, progress)


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    if args.prompts is None:
        return ()
    lines = [line.strip() for line in args.prompts.read_text().splitlines()]
    if not any(lines):
        raise ValueError(f"{args.prompts} holds no prompt")
    return tuple(line for line in lines if line)


def _forget(folder: Path, measure: str) -> None:
    (folder / f"{measure}.jsonl").unlink(missing_ok=True)
    if measure == "drift":
        for path in folder.glob("streams-*.state.safetensors"):
            path.unlink()
        for path in folder.glob("frames-*"):
            shutil.rmtree(path)
    if measure == "vbench":
        shutil.rmtree(folder / "clips", ignore_errors=True)


def _bar(args: argparse.Namespace, title: str) -> tqdm:
    return tqdm(desc=title, mininterval=2.0, disable=True if args.quiet else None, dynamic_ncols=True)


def _say(line: str) -> None:
    print(f"echo-infinity: {line}", file=sys.stderr)  # noqa: T201
