"""What both stages of distribution matching share: teacher, fake score, their losses, probes for drift."""

from __future__ import annotations

import argparse
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from echo_infinity.ranks import Ranks, join_ranks, leave_ranks
from echo_infinity.training.denoiser import Denoiser, Prompts
from echo_infinity.training.distributed import average_gradients, clip_gradients, shard, spread
from echo_infinity.training.drift import DriftProbe, Measure, should_stop
from echo_infinity.training.generator import GeneratorTrainer
from echo_infinity.training.losses import add_noise, dmd_gradient, flow_loss, score_level, surrogate_loss, to_x0
from echo_infinity.training.options import read_settings
from echo_infinity.training.prompts import load_prompts
from echo_infinity.training.rollout import Levels, few_steps
from echo_infinity.weights import Checkpoint, load_checkpoint

MOST_GRADIENT = 10.0


@dataclass(frozen=True)
class Matching:
    """Settings that both stages have; the defaults are the paper's first stage.

    Args:
        steps: updates of the fake score.
        ratio: updates of the fake score for one of the generator.
        batch: rollouts side by side.
        rate: learning rate of the generator.
        memory_rate: the memory's as a multiple of it.
        fake_rate: of the fake score.
        warmup: steps of linear warm-up of the generator's rates.
        guidance: scale of the teacher's classifier-free guidance.
        shift: of the noise levels at which scores are compared.
        student_steps: the student's warped steps.
        chunk: latent frames that are scored at once, the teacher's clip.
        ema: decay of the averaged weights, which are the ones exported.
        accumulate: batches whose gradients make one update.
        checkpointing: recompute everything but attention in the backward pass.
        bf16: compute linears in bfloat16; weights, attention and losses stay float32.
        probe_every: steps between measures of drift; 0 never measures.
        probe_blocks: length of a measured rollout.
        probe_streams: rollouts a measure.
        patience: probes worse than the best before them that end the run; 0 never ends it.
        margin: by how much they must be worse, as a share of the level a minute.
        seed: of everything that is drawn.
    """

    steps: int = 6000
    ratio: int = 5
    batch: int = 8
    rate: float = 2e-6
    memory_rate: float = 5.0
    fake_rate: float = 4e-7
    warmup: int = 1
    guidance: float = 3.0
    shift: float = 5.0
    student_steps: tuple[float, ...] = (1000, 750, 500, 250)
    chunk: int = 21
    ema: float = 0.99
    accumulate: int = 1
    checkpointing: bool = False
    bf16: bool = True
    probe_every: int = 0
    probe_blocks: int = 160
    probe_streams: int = 8
    patience: int = 3
    margin: float = 0.02
    seed: int = 0


class MatchingTrainer(GeneratorTrainer):
    """A student, a frozen teacher and a fake score.

    Args:
        settings: of the run.
        student: where the student starts; its policy is the one that is trained.
        teacher: a bidirectional model.
        fake: where the fake score starts.
        prompts: to draw from.
        out: the run's folder.
        ranks: the processes that share the run.
        measure: of drift; by default a :class:`DriftProbe`.

    Raises:
        ValueError: the models don't fit each other.
    """

    betas = (0.0, 0.999)
    curves, extendable = ("dmd", "fake"), True
    panels = GeneratorTrainer.panels | {"drift.png": ("drift", "motion")}

    def __init__(
        self,
        settings: Matching,
        student: Checkpoint,
        teacher: Checkpoint,
        fake: Checkpoint,
        prompts: Sequence[str],
        out: Path,
        ranks: Ranks | None = None,
        measure: Measure | None = None,
    ) -> None:
        ranks = Ranks() if ranks is None else ranks
        config = few_steps(student.config, settings.student_steps)
        per_block = config.window.frames_per_block
        if settings.chunk % per_block:
            raise ValueError(f"chunk {settings.chunk} is no multiple of frames_per_block {per_block}")
        if not prompts:
            raise ValueError("there are no prompts to draw from")
        self.teacher, self.fake = Denoiser(teacher, ranks, trained=False), Denoiser(fake, ranks, trained=True)
        for name, model in (("teacher", self.teacher), ("fake score", self.fake)):
            if model.frames != settings.chunk:
                raise ValueError(f"the {name} reads clips of {model.frames} frames, chunk is {settings.chunk}")
            if model.config.model.latent_channels != config.model.latent_channels:
                raise ValueError(f"the {name}'s latents are not the student's")
        self.prompts, self.levels = list(prompts), Levels(config)
        self.codec = student.codec
        identity = "\n".join([config.to_json(), student.fingerprint, teacher.fingerprint, fake.fingerprint])
        super().__init__(settings, config, out, ranks, identity)
        for block in self.fake.model.layers():
            block.checkpointing = settings.checkpointing
        self.measure = measure or DriftProbe(
            tuple(self.prompts[i % len(self.prompts)] for i in range(settings.probe_streams)), settings.probe_blocks
        )
        self.start_from_checkpoint(student)

    def other_optimisers(self, settings: Matching, ranks: Ranks) -> dict[str, Optimizer]:
        """Shard teacher and fake score; make the fake score's optimiser."""
        shard(ranks, self.teacher.model)
        shard(ranks, self.fake.model)
        parts = self.fake.model, self.fake.text
        groups = [{"params": [x for x in part.parameters() if x.requires_grad]} for part in parts]
        groups = [group for group in groups if group["params"]]
        fused = ranks.world == 1
        return {"fake_adam": AdamW(groups, lr=settings.fake_rate, betas=self.betas, weight_decay=0.01, fused=fused)}

    def take_step(self) -> dict[str, float]:
        """Accumulate gradients over batches; step the fake score and, in its turn, the generator."""
        s = self.settings
        generator = torch.Generator().manual_seed((s.seed << 32) + self.step)
        turn = self.step % s.ratio == 0
        row: dict[str, float] = {}
        for _ in range(s.accumulate):
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=s.bf16, cache_enabled=False):
                found = self.batch(generator, turn)
            row = {name: row.get(name, 0.0) + x / s.accumulate for name, x in found.items()}
        if turn:
            row |= self.update_generator()
        return row | self.update_fake() | self.probe()

    @abstractmethod
    def batch(self, generator: torch.Generator, turn: bool) -> dict[str, float]:
        """Generate a batch and leave the gradients of both losses, the generator's only in its turn."""

    def draw_prompts(self, generator: torch.Generator) -> list[int]:
        """Draw the prompts of a whole batch, of all processes."""
        return torch.randint(len(self.prompts), (self.settings.batch,), generator=generator).tolist()

    def draw_levels(self, generator: torch.Generator) -> Tensor:
        """Draw a whole batch's noise levels for scores and return this process's rows, ``(B,)``."""
        u = torch.rand(self.settings.batch, generator=generator)
        return score_level(u, self.settings.shift)[self.ranks.rows(len(u))].to(self.ranks.device)

    def match(self, clip: Tensor, new: int, prompts: Prompts, generator: torch.Generator) -> tuple[Tensor, float]:
        """Return the generator's loss on a clip, and the mean size of its gradient.

        Args:
            clip: ``(B, chunk, C, h, w)`` generated latents.
            new: frames at the end that count; those before are another chunk's.
            prompts: this process's.
            generator: of noise and levels.
        """
        noise, sigma = self.draw_noise(generator, clip.shape[1]), self.draw_levels(generator)
        with torch.no_grad():
            x_t = add_noise(clip.detach(), noise, sigma)
            flow = self.teacher.guided_flow(x_t, sigma, prompts, self.settings.guidance)
            real = to_x0(x_t, flow, sigma)
            fake = self.fake.x0(x_t, sigma, self.fake.encode(prompts))
        counted = slice(clip.shape[1] - new, None)
        gradient = dmd_gradient(clip[:, counted], real[:, counted], fake[:, counted])
        return surrogate_loss(clip[:, counted], gradient).mean(), gradient.abs().mean().item()

    def fake_loss(self, clip: Tensor, new: int, prompts: Prompts, generator: torch.Generator) -> Tensor:
        """Return the fake score's loss: flow matching on what the student made."""
        noise, sigma = self.draw_noise(generator, clip.shape[1]), self.draw_levels(generator)
        clip = clip.detach()
        flow = self.fake.flow(add_noise(clip, noise, sigma), sigma, self.fake.encode(prompts))
        counted = slice(clip.shape[1] - new, None)
        return flow_loss(flow[:, counted], clip[:, counted], noise[:, counted]).mean()

    def update_generator(self) -> dict[str, float]:
        """Step the generator and its averages; return gradient norms."""
        self.set_rate(self.settings.rate, self.settings.warmup, floor=1.0)
        trained = dict(self.trained())
        average_gradients(self.ranks, trained.values())
        row = {}
        if memory := [x for name, x in trained.items() if name.startswith("memory.")]:
            row["memory_grad_norm"] = clip_gradients(memory, float("inf"))
        row["grad_norm"] = clip_gradients(list(trained.values()), MOST_GRADIENT)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average(self.settings.ema)
        return row

    def update_fake(self) -> dict[str, float]:
        """Step the fake score; return its gradient norm."""
        trained = [x for _, x in self.fake.named_parameters() if x.requires_grad]
        average_gradients(self.ranks, trained)
        norm = clip_gradients(trained, MOST_GRADIENT)
        self.optimisers["fake_adam"].step()
        self.optimisers["fake_adam"].zero_grad(set_to_none=True)
        return {"fake_grad_norm": norm}

    def probe(self) -> dict[str, float]:
        """Measure drift where it is due; end the run, or keep the best model so far, as the measures say."""
        s = self.settings
        if not s.probe_every or (self.step and (self.step + 1) % s.probe_every):
            return {}
        device = self.ranks.device
        parts: dict[str, Any] = self.averaged_parts()
        found = {}
        if self.ranks.rank == 0:
            parts = {name: part.to(device) for name, part in parts.items()}
            codec = self.codec.to(device)
            model = Checkpoint(self.config, parts["model"], parts.get("memory"), parts["text"], codec, "")
            found = dict(self.measure(model))
        found = self.ranks.share(found)
        value = found["drift"]
        history = [row["drift"] for row in self.log if "drift" in row] + [value]
        if value == min(history):
            self.export(self.codec, self.out / "best")
        if should_stop(history, s.patience, s.margin):
            self.why_ended = (
                f"drift is {value:.4f} of the level a minute, was {min(history):.4f} at best; the model of then is "
                f"{self.out / 'best'}"
            )
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Weights of generator and fake score, and averages."""
        return super().tensors() | {f"fake.{name}": x.detach() for name, x in self.fake.named_parameters()}

    @torch.no_grad()
    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned."""
        super().load_tensors(named)
        for name, x in self.fake.named_parameters():
            x.copy_(spread(named[f"fake.{name}"], x))

    def finish(self) -> None:
        """Write the run's models: the student and the fake score."""
        self.export(self.codec)
        self.fake.export(self.out / "fake", self.codec, self.ranks)


def add_model_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add the options that name a stage's models, prompts and folder."""
    parser.add_argument("--student", required=True, help="folder of the model to start from")
    parser.add_argument("--teacher", required=True, help="folder of a model from 'train flow --bidirectional'")
    parser.add_argument("--fake", default=None, help="folder of the fake score to start from; default the teacher")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="text files, a prompt a line, or folders of clips"
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / stage, help="folder of checkpoint, log and models")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoint in --out")


def load_models(args: argparse.Namespace) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
    """Load student, teacher and fake score."""
    student, teacher = load_checkpoint(args.student), load_checkpoint(args.teacher)
    return student, teacher, teacher if args.fake is None else load_checkpoint(args.fake)


def run_stage(args: argparse.Namespace, settings: type[Matching], trainer: type[MatchingTrainer]) -> int:
    """Train a stage (or go on with it) as the options say; return the exit code."""
    chosen = read_settings(settings, args, trainer.name)
    prompts, ranks = load_prompts(args.prompts), join_ranks()
    try:
        run = trainer(chosen, *load_models(args), prompts, args.out, ranks)
        if not args.restart:
            run.resume()
        done = run.train(save_every=args.save_every)
        run.finish()
    finally:
        leave_ranks()
    return run.say_goodbye(done)
