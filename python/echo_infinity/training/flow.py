"""Train the generator and its memory by flow matching on streamed clips: the window slides, evicted frames are
written, later blocks read them, and gradients go back through the memory across blocks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from echo_infinity.cache import Geometry
from echo_infinity.codec import Codec
from echo_infinity.config import EchoConfig, preset
from echo_infinity.functional import FunctionalKV
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.recall import StreamMemory
from echo_infinity.text import GrammarText
from echo_infinity.training.align import attend_by_place, copy_by_place
from echo_infinity.training.clips import Clips, join_clips, load_clips
from echo_infinity.training.loop import Trainer
from echo_infinity.weights import find, load_checkpoint, load_parts, save_checkpoint
from echo_infinity.worlds import VOCABULARY

_STANDS_OUT = 2.0  # mean square over channels, of latents with unit variance
GROUPS = ("reappear", "first_open", "sighted", "closed")


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
            whether one shows, it makes the model believe in it sooner. Falls to nothing over the run.
        reappear_noise: least ``u`` (noise level before the shift) in those blocks, and in half of first sights.
        shift: of the training noise levels.
        context_noise: largest standard deviation of noise on the clean latents that a context pass caches.
        own_context: share of context passes that cache the model's own one-step prediction instead of the truth;
            a block that is not graded costs a pass more then.
        ema: decay of the averaged weights, which are the ones saved.
        seed: of weights, clips and noise.
        memory: False trains without memory.
        bf16: compute linears in bfloat16; weights, attention and losses stay float32.
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
    ema: float = 0.995
    seed: int = 0
    memory: bool = True
    bf16: bool = True


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
    for field in fields(FlowTraining):
        name = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(f"--no-{field.name}", dest=field.name, action="store_false")
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)


def run(args: argparse.Namespace) -> int:
    """Train (or go on training) as the options say; return the exit code."""
    settings = FlowTraining(**{f.name: getattr(args, f.name) for f in fields(FlowTraining)})
    config = preset(args.preset)
    if not settings.memory:
        config = replace(config, memory=None)
    clips = join_clips([load_clips(folder) for folder in args.clips], settings.blocks)
    trainer = FlowTrainer(settings, config, clips, args.out)
    if args.restart or not trainer.resume():
        if args.init is not None:
            trainer.start_from(args.init)
        if args.by_place:
            trainer.start_by_place()
    done = trainer.train()
    trainer.export(Codec.load(args.codec))
    if not done:
        print(f"stopped at step {trainer.step}; the same command goes on from {trainer.checkpoint}")  # noqa: T201
        return 130
    return 0


class FlowTrainer(Trainer):
    """A generator, its averaged weights, its optimiser and its place in the run.

    Args:
        settings: of the run.
        config: geometry.
        clips: encoded clips, from :func:`load_clips`.
        out: the run's folder; ``model/`` in it is the exported model.
    """

    name, curves, extendable = "flow", ("loss", *GROUPS), True

    def __init__(self, settings: FlowTraining, config: EchoConfig, clips: Clips, out: Path) -> None:
        self.config, self.clips = config, clips
        torch.manual_seed(settings.seed)
        self.model = CausalDiT(config.model)
        nn.init.zeros_(self.model.head.head.weight)
        self.memory = None if config.memory is None else EvolvingMemory(config.memory)
        self.text = GrammarText(VOCABULARY, config.model.text_tokens, config.model.text_width)
        self.geometry = Geometry(config)
        self.words = [self.text.tokenise(prompt) for prompt in clips.prompts]
        self.averaged = {name: x.detach().clone() for name, x in self.parameters()}
        rest = [x for name, x in self.parameters() if not name.startswith("memory.")]
        groups = [{"params": rest, "factor": 1.0}]
        if self.memory is not None:
            groups.append({"params": list(self.memory.parameters()), "factor": settings.memory_rate})
        optimiser = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        super().__init__(settings, config.to_json(), out, optimiser)

    def modules(self) -> dict[str, nn.Module]:
        """The trained parts by name."""
        parts: dict[str, nn.Module] = {"model": self.model, "text": self.text}
        return parts if self.memory is None else parts | {"memory": self.memory}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter with its part's name in front."""
        for part, module in self.modules().items():
            for name, x in module.named_parameters():
                yield f"{part}.{name}", x

    def start_from(self, name_or_folder: str) -> None:
        """Take the weights of a model; parts it lacks keep their fresh start."""
        loaded = load_checkpoint(name_or_folder)
        self.model.load_state_dict(loaded.model.state_dict())
        self.text.load_state_dict(loaded.text.state_dict())
        if self.memory is not None and loaded.memory is not None:
            self.memory.load_state_dict(loaded.memory.state_dict())
        self.averaged = {name: x.detach().clone() for name, x in self.parameters()}

    def start_by_place(self) -> None:
        """Start attention by place and the memory as a copier; see :mod:`echo_infinity.training.align`."""
        latents = self.clips.latents[:32, : 2 * self.config.window.frames_per_block].float()
        attend_by_place(self.config, self.model, latents, self.text.embed(self.words[:32]))
        if self.memory is not None:
            copy_by_place(self.memory)
        self.averaged = {name: x.detach().clone() for name, x in self.parameters()}

    def take_step(self) -> dict[str, float]:
        """Draw a batch, go forward through its blocks, backward through all of them, and step."""
        s = self.settings
        generator = torch.Generator().manual_seed((s.seed << 32) + self.step)
        self.set_rate(s.rate, s.warmup, floor=0.1)
        index, graded = self._draw(generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
            loss, parts = self.loss(index, generator, graded)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([x for _, x in self.parameters()], 1.0)
        self.optimiser.step()
        decay = min(s.ema, (2 + self.step) / (11 + self.step))
        with torch.no_grad():
            names, values = zip(*self.parameters(), strict=True)
            torch._foreach_lerp_([self.averaged[name] for name in names], list(values), 1 - decay)
        return {"loss": loss.item(), **parts, "grad_norm": norm.item()}

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """Draw a batch of clips and the blocks to grade; clips of one batch reappear in the same block."""
        s = self.settings
        if not s.graded:
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
            index: which clips.
            generator: of noise and noise levels.
            graded: blocks that count; by default all.

        Returns:
            The weighted mean over blocks, and the plain loss of each group of blocks in :data:`GROUPS`.
        """
        s, per_block = self.settings, self.config.window.frames_per_block
        latents = self.clips.latents[index, : s.blocks * per_block].float()
        marks = {name: getattr(self.clips, name)[index] for name in GROUPS}
        batch = len(index)
        cache = FunctionalKV(self.config)
        memory = None if self.memory is None else StreamMemory(self.memory, self.config, batch)
        memory_frames = 0 if self.memory is None else self.memory.config.frames
        text = self.model.encode_text(self.text.embed([self.words[i] for i in index.tolist()]))
        clean = self.model.condition(torch.zeros(1, 1))
        losses, weights = [], []
        graded = range(s.blocks) if graded is None else graded
        for block in range(max(graded) + 1):
            call = self.geometry.call(block * per_block, per_block, memory_frames=memory_frames)
            if memory is not None:
                # The state that all calls of a block but its first see.
                memory.prepare(cache, call)
                memory.publish()
            read = None if memory is None else memory.read(call)
            x0 = latents[:, block * per_block : (block + 1) * per_block]
            predicted, sigma = x0, torch.ones(batch, 1, 1, 1, 1)
            u = torch.rand(batch, generator=generator)
            own = block not in graded and torch.rand((), generator=generator) < s.own_context
            if block in graded or own:
                again = marks["reappear"][:, block]
                # What comes in or back is decided while there is much noise; of first sights only half are, or the
                # rest of their noise levels would never be learned.
                first = marks["first_open"][:, block] & (torch.rand(batch, generator=generator) < 0.5)
                if not own:
                    u = torch.where(again | first, s.reappear_noise + (1 - s.reappear_noise) * u, u)
                sigma = (s.shift * u / (1 + (s.shift - 1) * u))[:, None, None, None, None]
                noise = torch.randn(x0.shape, generator=generator)
                x_t = (1 - sigma) * x0 + sigma * noise
                with torch.set_grad_enabled(torch.is_grad_enabled() and not own):
                    level = self.model.condition(1000 * sigma.view(batch, 1))
                    flow = self.model(x_t, level, text, cache, call, read).float()
                if not own:
                    square = (flow - (noise - x0)).square()
                    if s.object_weight:
                        share = 1 + s.object_weight * (1 - self.step / s.steps) * object_share(x0)
                        square = square * (share / share.mean(dim=(1, 2, 3, 4), keepdim=True))
                    losses.append(square.mean(dim=(1, 2, 3, 4)))
                    weights.append(torch.where(again, s.reappear_weight, 1.0))
                predicted = x_t - sigma * flow.detach()
            if block < max(graded):
                with torch.no_grad():
                    context = self._context(x0, predicted, sigma, 1.0 if own else s.own_context, generator)
                    self.model(context, clean, text, cache, call, read, output=False)
                torch.clear_autocast_cache()  # or weights cast here, without a gradient, would serve the next block
        loss, weight = torch.stack(losses, 1), torch.stack(weights, 1)  # (B, blocks)
        parts = {}
        for name in GROUPS:
            mask = marks[name][:, list(graded)]
            if mask.any():
                parts[name] = loss.detach()[mask].mean().item()
        return (loss * weight).sum() / weight.sum(), parts

    def _context(
        self, x0: Tensor, predicted: Tensor, sigma: Tensor, own_share: float, generator: torch.Generator
    ) -> Tensor:
        """Latents for a context pass: noisy truth, or the model's own prediction, as it will meet in a rollout."""
        s = self.settings
        level = s.context_noise * torch.rand(sigma.shape, generator=generator)
        noisy = x0 + level * torch.randn(x0.shape, generator=generator)
        own = (torch.rand(sigma.shape, generator=generator) < own_share) & (sigma < 0.8)
        return torch.where(own, predicted, noisy)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and averaged weights."""
        named = {f"weights.{name}": x.detach() for name, x in self.parameters()}
        return named | {f"averaged.{name}": x for name, x in self.averaged.items()}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned."""
        weights = {name.removeprefix("weights."): x for name, x in named.items() if name.startswith("weights.")}
        load_parts({f"{name}.": part for name, part in self.modules().items()}, weights, str(self.checkpoint))
        self.averaged = {n.removeprefix("averaged."): x for n, x in named.items() if n.startswith("averaged.")}

    def export(self, codec: Codec, folder: Path | None = None) -> Path:
        """Write the averaged weights as a model folder (by default ``out/model``) and return it."""
        folder = self.out / "model" if folder is None else folder
        own = {name: x.detach().clone() for name, x in self.parameters()}
        self._set(self.averaged)
        try:
            save_checkpoint(folder, self.config, self.model, self.memory, self.text, codec)
        finally:
            self._set(own)
        return find(folder)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, x in self.parameters():
            x.copy_(values[name])


def object_share(latents: Tensor) -> Tensor:
    """How much each latent stands out from its row, 0 .. 1: scenes are the same all along a row, objects are not.

    Args:
        latents: ``(B, F, C, h, w)``, normalised.

    Returns:
        ``(B, F, 1, h, w)``.
    """
    away = (latents - latents.median(dim=-1, keepdim=True).values).square().mean(dim=2, keepdim=True)
    return (away / _STANDS_OUT).clamp(max=1.0)
