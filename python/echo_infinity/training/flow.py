"""Train a generator and its memory by flow matching on streamed clips: the window slides, evicted frames are
written, later blocks read them, and gradients go back through the memory across blocks. Or, with ``--bidirectional``,
train a teacher: one call over the whole clip in which every frame attends to every frame."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from echo_infinity.codec import Codec
from echo_infinity.config import EchoConfig, preset
from echo_infinity.policies import find_policy
from echo_infinity.ranks import Ranks, join_ranks, leave_ranks
from echo_infinity.training.align import attend_by_place, copy_by_place
from echo_infinity.training.clips import FRAMES_PER_BLOCK, Clips, join_clips, load_clips
from echo_infinity.training.denoiser import clip_flow, whole_clip
from echo_infinity.training.distributed import average_gradients, clip_gradients
from echo_infinity.training.generator import GeneratorTrainer
from echo_infinity.training.losses import add_noise, flow_loss, object_share, per_sample, shift_level, to_x0
from echo_infinity.training.options import add_settings, read_settings

GROUPS = ("reappear", "first_open", "sighted", "closed")
_GATES_EVERY = 10  # steps: to look at gates costs each write a second time


@dataclass(frozen=True)
class FlowTraining:
    """Settings of a training run.

    Args:
        steps: length of the run.
        batch: clips a step.
        blocks: blocks of a clip that are used, from its start.
        rate: peak learning rate of the DiT and the text embedding.
        memory_rate: the memory's rate as a multiple of ``rate``.
        warmup: steps of linear warm-up; cosine to a tenth of the rate follows.
        graded: blocks of a clip that are denoised and graded: one in which objects come back, where the clip has one,
            and others at random; the rest are only shown (context pass). 0 grades all blocks.
        reappear_share: share of batches of clips with a reappearance, where not all blocks are graded.
        entry_share: share of the other batches that are of clips with a first sight in the same, graded, block.
        reappear_weight: weight of blocks in which objects come back; only memory can lower their loss.
        object_weight: extra weight of the latents that objects cover, a few in a hundred; where it is uncertain
            whether one shows, it makes the model believe in it sooner.
        reappear_noise: least ``u`` (noise level before the shift) in those blocks, and in half of first sights.
        shift: of the training noise levels.
        context_noise: largest standard deviation of noise on the clean latents that a context pass caches.
        own_context: share of context passes that cache the model's own one-step prediction instead of the truth;
            a block that is not graded costs a pass more then.
        image_share: share of clips whose first frame is given clean where the first block is graded, so that the model
            learns to start from an image.
        ema: decay of the averaged weights, which are the ones saved.
        seed: of weights, clips and noise.
        memory: False trains without memory.
        bf16: compute linears in bfloat16; weights, attention and losses stay float32.
        policy: what happens to frames that leave the window, see :mod:`echo_infinity.policies`.
        bidirectional: train a teacher on whole clips of ``blocks`` blocks; no memory, no grading by block.
        cut_share: bidirectional: share of clips that start at a random block, as chunks of a long rollout do.
        text_dropout: share of prompts that are left empty, for classifier-free guidance.
        accumulate: batches whose gradients make one step.
        checkpointing: recompute everything but attention in the backward pass.
    """

    steps: int = 2000
    batch: int = 24
    blocks: int = 9
    rate: float = 1e-3
    memory_rate: float = 3.0
    warmup: int = 50
    graded: int = 0
    reappear_share: float = 0.8
    entry_share: float = 0.0
    reappear_weight: float = 5.0
    object_weight: float = 0.0
    reappear_noise: float = 0.6
    shift: float = 3.0
    context_noise: float = 0.1
    own_context: float = 0.0
    image_share: float = 0.0
    ema: float = 0.995
    seed: int = 0
    memory: bool = True
    bf16: bool = True
    policy: str = "evolving"
    bidirectional: bool = False
    cut_share: float = 0.0
    text_dropout: float = 0.0
    accumulate: int = 1
    checkpointing: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train flow``."""
    parser.add_argument(
        "--clips", type=Path, nargs="+", default=[Path("runs/clips")], help="folders made by 'train clips'"
    )
    parser.add_argument("--codec", type=Path, default=Path("runs/codec/codec.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/flow"), help="folder of checkpoint, log and model")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--init", default=None, help="model name or folder to start from")
    parser.add_argument("--by-place", action="store_true", help="start attention by place and memory as a copier")
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoint in --out")
    add_settings(parser, FlowTraining, "flow")


def run(args: argparse.Namespace) -> int:
    """Train (or go on training) as the options say; return the exit code."""
    settings = read_settings(FlowTraining, args, "flow")
    config = configure(preset(args.preset), settings)
    clips = join_clips([load_clips(folder) for folder in args.clips], settings.blocks)
    codec = Codec.load(args.codec)  # now, not after hours
    ranks = join_ranks()
    try:
        trainer = FlowTrainer(settings, config, clips, args.out, ranks)
        if args.restart or not trainer.resume():
            if args.init is not None:
                trainer.start_from(args.init)
            if args.by_place:
                trainer.start_by_place()
        done = trainer.train()
        trainer.export(codec)
    finally:
        leave_ranks()
    return trainer.say_goodbye(done)


def configure(config: EchoConfig, settings: FlowTraining) -> EchoConfig:
    """Return the geometry that a run of these settings trains.

    Raises:
        ValueError: the policy is unknown or needs what the model lacks.
    """
    if settings.bidirectional:
        return whole_clip(config, settings.blocks * FRAMES_PER_BLOCK)
    config = replace(config, image_start=settings.image_share > 0)
    if not settings.memory:
        config = replace(config, memory=None)
    return config if settings.policy == "evolving" else find_policy(settings.policy).configure(config)


class FlowTrainer(GeneratorTrainer):
    """Flow matching on encoded clips.

    Args:
        settings: of the run.
        config: geometry, from :func:`configure`.
        clips: encoded clips, from :func:`load_clips`.
        out: the run's folder; ``model/`` in it is the exported model.
        ranks: the processes that share the run.
    """

    name, curves, extendable = "flow", ("loss", *GROUPS), True

    def __init__(
        self, settings: FlowTraining, config: EchoConfig, clips: Clips, out: Path, ranks: Ranks | None = None
    ) -> None:
        config = replace(config, sampler=replace(config.sampler, solver="euler"))  # what a flow is followed with
        super().__init__(settings, config, out, ranks)
        self.clips = clips
        self.words = [self.text.tokenise(prompt) for prompt in clips.prompts]

    def start_by_place(self) -> None:
        """Start attention by place and the memory as a copier; see :mod:`echo_infinity.training.align`."""
        if self.ranks.world > 1:
            raise ValueError("start by place on one process, then go on from its model on several")
        latents = self.clips.latents[:32, : 2 * self.config.window.frames_per_block].float()
        attend_by_place(self.config, self.model, latents, self.text.embed(self.words[:32]))
        if self.memory is not None and self.memory.config.positions:  # a copier needs places
            copy_by_place(self.memory)
        self.average_anew()

    def take_step(self) -> dict[str, float]:
        """Draw a batch, go forward through its blocks, backward through all of them, and step."""
        s = self.settings
        generator = torch.Generator().manual_seed((s.seed << 32) + self.step)
        self.set_rate(s.rate, s.warmup, floor=0.1)
        self.optimiser.zero_grad(set_to_none=True)
        rows: list[dict[str, float]] = []
        for _ in range(s.accumulate):
            index, graded = self._draw(generator)
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=s.bf16):
                if s.bidirectional:
                    loss, parts = self.clip_loss(index, generator)
                else:
                    loss, parts = self.loss(index, generator, graded)
            (loss / s.accumulate).backward()
            rows.append(parts)
        trained = [x for _, x in self.trained()]
        average_gradients(self.ranks, trained)
        norm = clip_gradients(trained, 1.0)
        self.optimiser.step()
        self.average(s.ema)
        names = list(dict.fromkeys(name for row in rows for name in row))
        means = {n: sum(row[n] for row in rows if n in row) / sum(n in row for row in rows) for n in names}
        return {**means, "grad_norm": norm}

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """Draw a batch of clips and the blocks to grade; clips of one batch reappear in the same block."""
        s = self.settings
        if not s.graded or s.bidirectional:
            return torch.randint(len(self.clips), (s.batch,), generator=generator), list(range(s.blocks))
        chosen, pool, end = [], torch.arange(len(self.clips)), s.blocks
        for share, marks in ((s.reappear_share, self.clips.reappear), (s.entry_share, self.clips.first_open)):
            if torch.rand((), generator=generator) < share and (marks := marks[:, : s.blocks]).any():
                rows, blocks = marks.nonzero(as_tuple=True)
                block = blocks[torch.randint(len(blocks), (), generator=generator)]
                chosen, pool = [int(block)], rows[blocks == block]
                end = min(s.blocks, int(block) + 3)  # a step costs what the blocks up to its last graded one cost
                break
        others = torch.randperm(end, generator=generator).tolist()
        chosen += [block for block in others if block not in chosen][: s.graded - len(chosen)]
        return pool[torch.randint(len(pool), (s.batch,), generator=generator)], sorted(chosen)

    def loss(
        self, index: Tensor, generator: torch.Generator, graded: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss of the clips ``index`` ``(B,)``, streamed block by block.

        Args:
            index: which clips, of all processes; this one streams its rows.
            generator: of noise and noise levels.
            graded: blocks that count; by default all.

        Returns:
            The weighted mean over blocks, and for the log that mean over all processes and the plain loss of each
            group of blocks in :data:`GROUPS`.
        """
        s, per_block, rows = self.settings, self.config.window.frames_per_block, self.ranks.rows(len(index))
        clips, end = self.clips, s.blocks * per_block
        latents, shown = (x[index[rows], :end].float().to(self.ranks.device) for x in (clips.latents, clips.shown))
        marks = {name: getattr(self.clips, name)[index] for name in GROUPS}
        batch = len(index)
        stream = self.streams(self._encode_text(index, generator), len(latents))
        gates = self.watch_gates(stream, self.step % _GATES_EVERY == 0)
        clean = self.model.condition(torch.zeros(1, 1, device=self.ranks.device))
        losses, weights = [], []
        graded = range(s.blocks) if graded is None else graded
        for block in range(max(graded) + 1):
            stream.begin()
            stream.publish()  # the state that all calls of a block but its first see
            at = slice(block * per_block, (block + 1) * per_block)
            x0 = latents[:, at]
            predicted, sigma = x0, torch.ones(len(x0), device=x0.device)
            u = torch.rand(batch, generator=generator)
            own = block not in graded and bool(torch.rand((), generator=generator) < s.own_context)
            if block in graded or own:
                again = marks["reappear"][:, block]
                # What comes in or back is decided while there is much noise; of first sights only half are, or the
                # rest of their noise levels would never be learned.
                first = marks["first_open"][:, block] & (torch.rand(batch, generator=generator) < 0.5)
                if not own:
                    u = torch.where(again | first, s.reappear_noise + (1 - s.reappear_noise) * u, u)
                sigma = shift_level(u, s.shift)[rows].to(x0.device)
                levels, counted = sigma[:, None], None
                if s.image_share and block == 0:
                    levels, counted = self._give_images(sigma, x0.shape[1], generator)
                noise = self.draw_noise(generator, x0.shape[1], batch)
                x_t = add_noise(x0, noise, levels)
                with torch.set_grad_enabled(torch.is_grad_enabled() and not own):
                    flow = stream.flow(x_t, self.model.condition(1000 * levels))
                if not own:
                    weight = counted
                    if s.object_weight:
                        share = 1 + s.object_weight * object_share(x0)
                        weight = share if counted is None else share * counted
                    losses.append(flow_loss(flow, x0, noise, weight))
                    weights.append(torch.where(again, s.reappear_weight, 1.0))
                predicted = to_x0(x_t, flow.detach(), levels)
            if block < max(graded):
                own_share = 1.0 if own else s.own_context
                stream.show(self._context(batch, shown[:, at], predicted, sigma, own_share, generator), clean)
        groups = {name: mark[:, list(graded)] for name, mark in marks.items()}
        loss, parts = self._graded(torch.stack(losses, 1), torch.stack(weights, 1), groups)
        return loss, parts | self.gate_statistics(gates)

    def clip_loss(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss of the clips ``index`` ``(B,)`` as wholes: one noise level a clip, no window.

        Returns:
            As :meth:`loss`.
        """
        s, frames, rows = self.settings, self.config.window.frames_per_block, self.ranks.rows(len(index))
        room = self.clips.closed.shape[1] - s.blocks
        cut = torch.rand(len(index), generator=generator) < s.cut_share
        first = torch.where(cut, torch.randint(room + 1, (len(index),), generator=generator), 0)
        places = [slice(int(b), int(b) + s.blocks) for b in first]
        starts = [(int(i), int(b) * FRAMES_PER_BLOCK) for i, b in zip(index, first, strict=True)][rows]
        x0 = torch.stack([self.clips.latents[i, b : b + frames].float() for i, b in starts]).to(self.ranks.device)
        text = self._encode_text(index, generator)
        sigma = shift_level(torch.rand(len(index), generator=generator), s.shift)[rows].to(x0.device)
        noise = self.draw_noise(generator, frames, len(index))
        flow = clip_flow(self.model, self.geometry, add_noise(x0, noise, sigma), sigma, text)
        error = (flow - (noise - x0)).square().mean(dim=(2, 3, 4))  # (B, F)
        losses = error.unflatten(1, (s.blocks, FRAMES_PER_BLOCK)).mean(2)
        groups = {
            name: torch.stack([getattr(self.clips, name)[i, at] for i, at in zip(index, places, strict=True)])
            for name in GROUPS
        }
        return self._graded(losses, torch.ones(len(index), s.blocks), groups)

    def _graded(self, losses: Tensor, weight: Tensor, groups: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Weigh this process's ``(B / processes, blocks)`` losses by the ``(B, blocks)`` weights of all."""
        rows, everyone = self.ranks.rows(len(weight)), torch.zeros(weight.shape, device=losses.device)
        weight = weight.to(losses.device)
        loss = (losses * weight[rows]).sum() / weight.sum() * self.ranks.world
        everyone[rows] = losses.detach()
        everyone = self.ranks.total(everyone)
        parts = {"loss": ((everyone * weight).sum() / weight.sum()).item()}
        for name, mark in groups.items():
            if mark.any():
                parts[name] = everyone[mark].mean().item()
        return loss, parts

    def _give_images(self, sigma: Tensor, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the clips whose first frame is given; return levels ``(B, F)`` and what counts ``(B, F, 1, 1, 1)``."""
        given = torch.rand(self.settings.batch, generator=generator) < self.settings.image_share
        noisy = torch.ones(len(sigma), frames, device=sigma.device)
        noisy[given[self.ranks.rows(len(given))].to(sigma.device), 0] = 0
        return sigma[:, None] * noisy, noisy[:, :, None, None, None]

    def _encode_text(self, index: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        words = [self.words[i] for i in index.tolist()]
        if self.settings.text_dropout:
            dropped = torch.rand(len(words), generator=generator) < self.settings.text_dropout
            words = [[] if drop else w for w, drop in zip(words, dropped.tolist(), strict=True)]
        return self.model.encode_text(self.text.embed(words[self.ranks.rows(len(words))]))

    def _context(
        self,
        batch: int,
        shown: Tensor,
        predicted: Tensor,
        sigma: Tensor,
        own_share: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Latents for a context pass: what the clip shows, noisy, or the model's own prediction, as in a rollout."""
        rows = self.ranks.rows(batch)
        level = self.settings.context_noise * torch.rand(batch, generator=generator)[rows].to(shown.device)
        noisy = shown + per_sample(level) * self.draw_noise(generator, shown.shape[1], batch)
        own = (torch.rand(batch, generator=generator)[rows].to(shown.device) < own_share) & (sigma < 0.8)
        return torch.where(per_sample(own), predicted, noisy)
