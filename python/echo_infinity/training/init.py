"""Causal initialisation: teach a causal student to reach clean blocks in few steps, before it rolls out on its own.

By regression onto the teacher's trajectories (each block of each trajectory at one of the student's noise levels, its
clean past shown in context passes), or, without a teacher, by flow matching at those levels on encoded clips.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from echo_infinity.config import EchoConfig, preset
from echo_infinity.policies import find_policy
from echo_infinity.ranks import Ranks, join_ranks, leave_ranks
from echo_infinity.training.clips import join_clips, load_clips
from echo_infinity.training.denoiser import Denoiser
from echo_infinity.training.distributed import average_gradients, clip_gradients
from echo_infinity.training.generator import GeneratorTrainer
from echo_infinity.training.losses import add_noise, flow_loss, per_sample, to_x0, x0_loss
from echo_infinity.training.options import add_settings, read_settings
from echo_infinity.training.prompts import load_prompts
from echo_infinity.training.rollout import Levels, few_steps
from echo_infinity.training.trajectories import Paths, Trajectories, build_trajectories
from echo_infinity.weights import load_checkpoint


@dataclass(frozen=True)
class Initialisation:
    """Settings of a run.

    Args:
        steps: length of the run.
        batch: clips a step.
        rate: peak learning rate of the DiT and the text embedding.
        memory_rate: the memory's rate as a multiple of ``rate``.
        warmup: steps of linear warm-up; cosine to a tenth of the rate follows.
        student_steps: the student's warped steps.
        context_noise: largest standard deviation of noise on the clean latents that a context pass caches.
        trajectories: how many the teacher makes.
        substeps: the teacher's steps between two of the student's.
        guidance: scale of the teacher's classifier-free guidance.
        ema: decay of the averaged weights, which are the ones saved.
        accumulate: batches whose gradients make one step.
        checkpointing: recompute everything but attention in the backward pass.
        bf16: compute linears in bfloat16; weights, attention and losses stay float32.
        policy: what happens to frames that leave the window, see :mod:`echo_infinity.policies`.
        seed: of weights and everything that is drawn.
    """

    steps: int = 2000
    batch: int = 8
    rate: float = 2e-4
    memory_rate: float = 3.0
    warmup: int = 50
    student_steps: tuple[float, ...] = (1000, 750, 500, 250)
    context_noise: float = 0.0
    trajectories: int = 1024
    substeps: int = 12
    guidance: float = 3.0
    ema: float = 0.99
    accumulate: int = 1
    checkpointing: bool = False
    bf16: bool = True
    policy: str = "evolving"
    seed: int = 0


class InitTrainer(GeneratorTrainer):
    """Regression of a causal student.

    Args:
        settings: of the run.
        config: the student's geometry, from :func:`~echo_infinity.training.rollout.few_steps`.
        data: trajectories; or, with one state a clip, clean latents for flow matching.
        out: the run's folder; ``model/`` in it is the exported student.
        ranks: the processes that share the run.
        fingerprint: of the data's source.
    """

    name, curves, extendable = "init", ("loss", "last_block"), True

    def __init__(
        self,
        settings: Initialisation,
        config: EchoConfig,
        data: Trajectories,
        out: Path,
        ranks: Ranks | None = None,
        fingerprint: str = "",
    ) -> None:
        self.data, self.levels = data, Levels(config)
        states = data.states.shape[1]
        if states not in (1, len(self.levels) + 1):
            raise ValueError(f"trajectories have {states} states, a student of {len(self.levels)} steps needs one more")
        super().__init__(settings, config, out, ranks, f"{config.to_json()}\n{fingerprint}")

    def take_step(self) -> dict[str, float]:
        """Draw a batch, go through its blocks, and step."""
        s = self.settings
        generator = torch.Generator().manual_seed((s.seed << 32) + self.step)
        self.set_rate(s.rate, s.warmup, floor=0.1)
        self.optimiser.zero_grad(set_to_none=True)
        row: dict[str, float] = {}
        for _ in range(s.accumulate):
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=s.bf16):
                losses = self.losses(generator)  # (B, blocks)
            (losses.mean() / s.accumulate).backward()
            found = self.ranks.mean({"loss": losses.mean().item(), "last_block": losses[:, -1].mean().item()})
            row = {name: row.get(name, 0.0) + x / s.accumulate for name, x in found.items()}
        trained = [x for _, x in self.trained()]
        average_gradients(self.ranks, trained)
        row["grad_norm"] = clip_gradients(trained, 1.0)
        self.optimiser.step()
        self.average(s.ema)
        return row

    def losses(self, generator: torch.Generator) -> Tensor:
        """Return this process's losses on a freshly drawn batch, ``(B, blocks)``."""
        s, per_block = self.settings, self.config.window.frames_per_block
        rows, device = self.ranks.rows(s.batch), self.ranks.device
        index = torch.randint(len(self.data), (s.batch,), generator=generator)[rows]
        states = self.data.states[index].float().to(device)  # (B, K + 1, F, C, h, w)
        regress, blocks = states.shape[1] > 1, states.shape[2] // per_block
        timesteps, sigmas = torch.tensor(self.levels.timesteps), torch.tensor(self.levels.sigmas)
        stream = self.streams(self.encode([self.data.prompts[i] for i in index.tolist()]), len(states))
        clean = self.model.condition(torch.zeros(1, 1, device=device))
        losses = []
        for block in range(blocks):
            stream.begin()
            stream.publish()  # the state that all calls of a block but its first see
            part = states[:, :, block * per_block : (block + 1) * per_block]
            step = torch.randint(len(sigmas), (s.batch,), generator=generator)[rows]
            x0, sigma, noise = part[:, -1], sigmas[step].to(device), self.draw_noise(generator, per_block)
            x_t = part[torch.arange(len(part)), step] if regress else add_noise(x0, noise, sigma)
            flow = stream.flow(x_t, self.model.condition(timesteps[step][:, None].to(device)))
            losses.append(x0_loss(to_x0(x_t, flow, sigma), x0) if regress else flow_loss(flow, x0, noise))
            if block + 1 < blocks:
                level = s.context_noise * torch.rand(s.batch, generator=generator)[rows].to(device)
                stream.show(x0 + per_sample(level) * self.draw_noise(generator, per_block), clean)
        return torch.stack(losses, dim=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train init``."""
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--init", required=True, help="model to start from: a causal one, or the teacher")
    parser.add_argument("--teacher", default=None, help="folder of a model from 'train flow --bidirectional'")
    parser.add_argument("--prompts", type=Path, nargs="+", help="for the teacher: text files or folders of clips")
    parser.add_argument("--clips", type=Path, nargs="+", default=None, help="without a teacher: folders of clips")
    parser.add_argument("--blocks", type=int, default=7, help="without a teacher: blocks of a clip that are used")
    parser.add_argument("--out", type=Path, default=Path("runs/init"), help="folder of checkpoint, log and model")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoint in --out")
    add_settings(parser, Initialisation, "init")


def run(args: argparse.Namespace) -> int:
    """Train (or go on training) as the options say; return the exit code."""
    settings = read_settings(Initialisation, args, "init")
    if (args.teacher is None) == (args.clips is None):
        raise ValueError("give either --teacher, for regression onto its trajectories, or --clips, for flow matching")
    config = few_steps(preset(args.preset), settings.student_steps)
    if settings.policy != "evolving":
        config = find_policy(settings.policy).configure(config)
    ranks = join_ranks()
    try:
        data, fingerprint = _load_data(args, settings, config, ranks)
        trainer = InitTrainer(settings, config, data, args.out, ranks, fingerprint)
        start = load_checkpoint(args.init)
        if args.restart or not trainer.resume():
            trainer.start_from_checkpoint(start)
        done = trainer.train(save_every=args.save_every)
        trainer.export(start.codec)
    finally:
        leave_ranks()
    return trainer.say_goodbye(done)


def _load_data(
    args: argparse.Namespace, settings: Initialisation, config: EchoConfig, ranks: Ranks
) -> tuple[Trajectories, str]:
    if args.teacher is None:
        clips = join_clips([load_clips(folder) for folder in args.clips], args.blocks)
        return Trajectories(clips.latents[:, None], clips.prompts), ""
    if args.prompts is None:
        raise ValueError("the teacher needs --prompts: a text file, a prompt a line, or a folder of clips")
    teacher, prompts = load_checkpoint(args.teacher), load_prompts(args.prompts)
    paths = Paths(tuple(Levels(config).sigmas), settings.substeps, settings.guidance, settings.seed)
    denoiser = Denoiser(teacher, Ranks(device=ranks.device), trained=False)
    folder, count = args.out / "trajectories", settings.trajectories
    return build_trajectories(denoiser, teacher.fingerprint, prompts, paths, folder, count, ranks), teacher.fingerprint
