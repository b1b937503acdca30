"""Stage 1: distil the causal student into few steps by distribution matching on its own rollouts, memory and all.

Each step generates a batch of clips from noise. The fake score learns them every time; every ``ratio`` steps their
gradient ``(fake_x0 - real_x0) / mean|x0 - real_x0|`` also goes back through the rollout into generator and memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_infinity.training.matching import Matching, MatchingTrainer, add_model_arguments, run_stage
from echo_infinity.training.options import add_settings
from echo_infinity.training.rollout import roll_out


@dataclass(frozen=True)
class Distillation(Matching):
    """Settings of stage 1; see :class:`Matching`."""


class DistillTrainer(MatchingTrainer):
    """Stage 1: every rollout starts at the beginning of a stream and is one clip of the teacher's."""

    name = "distill"

    def batch(self, generator: torch.Generator, turn: bool) -> dict[str, float]:
        """Generate a batch of clips, each from its stream's beginning."""
        s, rows = self.settings, self.ranks.rows(self.settings.batch)
        prompts = [self.prompts[i] for i in self.draw_prompts(generator)][rows]
        exit_step = int(torch.randint(len(self.levels), (), generator=generator))
        with torch.set_grad_enabled(turn):
            text = self.encode(prompts)
        stream = self.streams(text, len(prompts))
        gates = self.watch_gates(stream, turn)

        def draw() -> Tensor:
            return self.draw_noise(generator, self.config.window.frames_per_block)

        blocks = s.chunk // self.config.window.frames_per_block
        clip = roll_out(stream, self.levels, exit_step, blocks, draw, grad=turn)
        row = {"exit": float(exit_step)}
        if turn:
            loss, size = self.match(clip, s.chunk, prompts, generator)
            (loss / s.accumulate).backward()
            row |= self.ranks.mean({"dmd": loss.item(), "dmd_size": size}) | self.gate_statistics(gates)
        loss = self.fake_loss(clip, s.chunk, prompts, generator)
        (loss / s.accumulate).backward()
        return row | self.ranks.mean({"fake": loss.item()})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train distill``."""
    add_model_arguments(parser, "distill")
    add_settings(parser, Distillation, "distill")


def run(args: argparse.Namespace) -> int:
    """Train (or go on training) as the options say; return the exit code."""
    return run_stage(args, Distillation, DistillTrainer)
