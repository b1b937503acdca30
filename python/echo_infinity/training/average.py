"""Average models that were trained from one start: each keeps what the others forgot.

Flow matching on clips teaches prompts and recall, self-rollouts teach to stay on course for hours; where one model
was trained from the other, the point half way between them has both. Source: model soups (Wortsman et al. 2022).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from echo_infinity.training.denoiser import check_words
from echo_infinity.weights import Checkpoint, load_checkpoint, save_checkpoint


@torch.no_grad()
def average(models: Sequence[Checkpoint]) -> Checkpoint:
    """Return the last of ``models`` with the mean of all their weights; its sampler and codec are its own.

    Args:
        models: at least two of one geometry, with the worlds' own words. The last one is changed in place.

    Raises:
        ValueError: there is one model only, or they differ in more than weights and sampler.
    """
    last = models[-1]
    if len(models) < 2:
        raise ValueError("an average needs two models or more; name several folders")
    for model in models:
        check_words(model)
        if replace(model.config, sampler=last.config.sampler) != last.config:
            raise ValueError(
                f"models of different geometry have no average: {model.config.to_json()} and {last.config.to_json()}"
            )
        if model.text.vocabulary != last.text.vocabulary:
            raise ValueError("models that know different words have no average; train them from one start")
    for name in ("model", "memory", "text"):
        parts: list[nn.Module] = [part for model in models if (part := getattr(model, name)) is not None]
        if parts:
            states = [dict(part.named_parameters()) for part in parts]
            for key, x in states[-1].items():
                x.copy_(torch.stack([state[key].double() for state in states]).mean(0))
    return last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train average``."""
    parser.add_argument(
        "--models", nargs="+", required=True, help="names or folders; sampler and codec are those of the last"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/average"), help="folder; the model is in OUT/model")


def run(args: argparse.Namespace) -> int:
    """Write the average of the models; return the exit code."""
    found = average([load_checkpoint(name) for name in args.models])
    save_checkpoint(args.out / "model", found.config, found.model, found.memory, found.text, found.codec)
    print(f"the average of {len(args.models)} models is {args.out / 'model'}")  # noqa: T201
    return 0
