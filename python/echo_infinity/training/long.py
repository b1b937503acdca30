"""Stage 2: tune the distilled student on long streaming rollouts, so that it meets its own far future in training.

Each step generates one chunk of every stream and scores it together with the frames before it; cache, memory and place
are carried to the next step, their history cut. Blocks' linears are trained through low-rank adapters, in generator
and fake score alike, the memory fully. Prompts change on the way.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_infinity.training.distributed import whole
from echo_infinity.training.lora import add_lora, merge_lora, peft_names
from echo_infinity.training.matching import Matching, MatchingTrainer, add_model_arguments, run_stage
from echo_infinity.training.options import add_settings
from echo_infinity.training.passes import StreamPasses
from echo_infinity.training.rollout import roll_out
from echo_infinity.weights import write_tensors


@dataclass(frozen=True)
class LongTuning(Matching):
    """Settings of stage 2; see :class:`Matching` for the others.

    Args:
        frames: latent frames of a rollout; then the next one starts.
        overlap: frames of the chunk before that a chunk is scored with; they don't count.
        switch_share: share of rollouts whose prompts change once, between two chunks.
        rank: of the adapters.
        alpha: their strength times ``rank``.
    """

    rate: float = 1e-5
    fake_rate: float = 2e-6
    frames: int = 240
    overlap: int = 3
    switch_share: float = 0.5
    rank: int = 256
    alpha: float = 256.0


@dataclass
class Rollout:
    """A batch of streams under way; ``prompts`` and ``after`` are indices, of all processes."""

    prompts: list[int]
    after: list[int]  # the prompts that the switch goes to
    switch: int  # frame at which it happens; 0 never
    stream: StreamPasses
    recent: Tensor  # (B, <= n, C, h, w) latents of the last frames: overlap and re-cache


class LongTrainer(MatchingTrainer):
    """Stage 2; see :class:`MatchingTrainer`."""

    name = "long"

    rollout: Rollout | None = None

    def prepare(self, settings: LongTuning) -> None:
        """Freeze everything but the memory; put adapters on both models' blocks."""
        w, s = self.config.window, settings
        if s.overlap % w.frames_per_block or not 0 <= s.overlap < s.chunk:
            raise ValueError(f"overlap {s.overlap} must be a multiple of frames_per_block {w.frames_per_block} < chunk")
        if s.frames < s.chunk:
            raise ValueError(f"rollouts of {s.frames} frames have no room for a chunk of {s.chunk}")
        for part in (self.text, self.fake.text):
            part.requires_grad_(False)
        for model in (self.model, self.fake.model):
            add_lora(model, s.rank, s.alpha)

    def batch(self, generator: torch.Generator, turn: bool) -> dict[str, float]:
        """Go on with the streams by a chunk; cut the history behind it."""
        s, w = self.settings, self.config.window
        if self.rollout is None or self.rollout.stream.frame + s.chunk - s.overlap > s.frames:
            self.rollout = self._start(generator)
        rollout, stream, rows = self.rollout, self.rollout.stream, self.ranks.rows(s.batch)
        switched = stream.frame > 0 and stream.frame == rollout.switch
        if switched:
            rollout.prompts = rollout.after
        prompts = [self.prompts[i] for i in rollout.prompts[rows]]
        with torch.set_grad_enabled(turn):
            stream.text = self.encode(prompts)
        if switched:
            clean = self.model.condition(torch.zeros(1, 1, device=self.ranks.device))
            stream.switch(stream.text, rollout.recent[:, -w.local_frames :], clean)
        exit_step = int(torch.randint(len(self.levels), (), generator=generator))
        gates = self.watch_gates(stream, turn)

        def draw() -> Tensor:
            return self.draw_noise(generator, w.frames_per_block)

        first = stream.frame == 0
        count = s.chunk if first else s.chunk - s.overlap
        new = roll_out(stream, self.levels, exit_step, count // w.frames_per_block, draw, grad=turn)
        clip = new if first else torch.cat([rollout.recent[:, rollout.recent.shape[1] - s.overlap :], new], dim=1)
        row = {"exit": float(exit_step), "frame": float(stream.frame)}
        if turn:
            loss, size = self.match(clip, count, prompts, generator)
            (loss / s.accumulate).backward()
            row |= self.ranks.mean({"dmd": loss.item(), "dmd_size": size}) | self.gate_statistics(gates)
        loss = self.fake_loss(clip, count, prompts, generator)
        (loss / s.accumulate).backward()
        stream.detach()
        rollout.recent = torch.cat([rollout.recent, new.detach()], dim=1)[:, -max(s.overlap, w.local_frames) :]
        return row | self.ranks.mean({"fake": loss.item()})

    def _start(self, generator: torch.Generator) -> Rollout:
        s, w = self.settings, self.config.window
        prompts, after = self.draw_prompts(generator), self.draw_prompts(generator)
        places = [at for at in range(s.chunk, s.frames, s.chunk - s.overlap) if at >= w.window_frames]
        switch = places[int(torch.randint(len(places), (), generator=generator))] if places else 0
        if torch.rand((), generator=generator) >= s.switch_share:
            switch = 0
        return self._rollout(prompts, after, switch)

    def _rollout(self, prompts: list[int], after: list[int], switch: int) -> Rollout:
        c, share = self.config, len(prompts) // self.ranks.world
        none = torch.zeros(share, 0, c.model.latent_channels, c.latent_rows, c.latent_columns, device=self.ranks.device)
        return Rollout(prompts, after, switch, self.streams([], share), none)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages, and the streams under way."""
        named, r = super().tensors(), self.rollout
        if r is None:
            return named
        numbers = {"prompts": r.prompts, "after": r.after, "place": [r.switch, r.stream.frame]}
        named |= {f"rollout.{name}": torch.tensor(x) for name, x in numbers.items()}
        parts = {f"cache.{name}": x for name, x in r.stream.cache.tensors().items()} | {"recent": r.recent}
        if r.stream.recall is not None:
            parts |= {f"recall.{name}": x for name, x in r.stream.recall.tensors().items()}
        return named | {f"rollout.{name}": self.ranks.join(x, _batch_dim(name)) for name, x in parts.items()}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned."""
        super().load_tensors({name: x for name, x in named.items() if not name.startswith("rollout.")})
        own = _part(named, "rollout.")
        if not own:
            return
        switch, frame = own.pop("place").tolist()
        r = self.rollout = self._rollout(own.pop("prompts").tolist(), own.pop("after").tolist(), switch)
        rows, r.stream.frame = self.ranks.rows(len(r.prompts)), frame
        mine = {name: _take(x, _batch_dim(name), rows).to(self.ranks.device) for name, x in own.items()}
        r.recent = mine["recent"]
        r.stream.cache.load_tensors(_part(mine, "cache."))
        if r.stream.recall is not None:
            r.stream.recall.load_tensors(_part(mine, "recall."))

    def plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Merge adapters into their weights."""
        return merge_lora(state, self.settings.alpha / self.settings.rank)

    def finish(self) -> None:
        """Write the run's models: the student merged, and its adapters alone."""
        self.export(self.codec)
        adapters = {n.removeprefix("model."): x for n, x in self.averaged.items() if n.startswith("model.")}
        complete = {name: whole(x) for name, x in adapters.items()}
        if self.ranks.rank == 0:
            write_tensors(self.out / "lora.safetensors", peft_names(complete), {"alpha": str(self.settings.alpha)})


def _part(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}


def _batch_dim(name: str) -> int | None:
    """Which dim of a saved tensor counts streams: None where none does."""
    if name.startswith("cache.frames") or name in ("recall.writes", "recall.end"):
        return None
    return 1 if name in ("recall.state", "recall.k", "recall.v") else 0


def _take(x: Tensor, dim: int | None, rows: slice) -> Tensor:
    return x if dim is None else x.narrow(dim, rows.start, rows.stop - rows.start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train long``."""
    add_model_arguments(parser, "long")
    add_settings(parser, LongTuning, "long")


def run(args: argparse.Namespace) -> int:
    """Train (or go on training) as the options say; return the exit code."""
    return run_stage(args, LongTuning, LongTrainer)
