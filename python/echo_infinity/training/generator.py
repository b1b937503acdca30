"""What trainers of a generator share: its parts, running averages of their weights, and the exported model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from echo_infinity.cache import KV, Geometry
from echo_infinity.codec import Codec
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.policies import find_policy
from echo_infinity.ranks import Ranks
from echo_infinity.recall import StreamMemory
from echo_infinity.text import GrammarText
from echo_infinity.training.denoiser import Prompts, check_words, encode_prompts
from echo_infinity.training.distributed import shard, spread, whole
from echo_infinity.training.loop import Trainer
from echo_infinity.training.passes import StreamPasses
from echo_infinity.weights import Checkpoint, find, load_checkpoint, save_checkpoint
from echo_infinity.worlds import VOCABULARY


class GeneratorTrainer(Trainer):
    """A generator, its averaged weights and its optimiser.

    A subclass may change the fresh parts in :meth:`prepare` before they are sharded and the optimiser is made.

    Args:
        settings: of the run, with ``seed``, ``batch``, ``rate``, ``memory_rate`` and ``checkpointing``.
        config: geometry.
        out: the run's folder; ``model/`` in it is the exported model.
        ranks: the processes that share the run.
        identity: what else fixes the run, as text; default the configuration.
    """

    betas = (0.9, 0.99)
    panels = {"gates.png": ("gate_mean", "gate_std")}  # noqa: RUF012  never changed

    def __init__(
        self, settings: Any, config: EchoConfig, out: Path, ranks: Ranks | None = None, identity: str | None = None
    ) -> None:
        self.config, self.policy = config, find_policy(config.policy)
        ranks = Ranks() if ranks is None else ranks
        torch.manual_seed(settings.seed)
        self.model = CausalDiT(config.model)
        nn.init.zeros_(self.model.head.head.weight)
        self.memory = None if config.memory is None else EvolvingMemory(config.memory)
        self.text = GrammarText(VOCABULARY, config.model.text_tokens, config.model.text_width)
        self.geometry = Geometry(config, ranks.device)
        for block in self.model.layers():
            block.checkpointing = settings.checkpointing
        self.prepare(settings)
        for module in self.modules().values():
            module.to(ranks.device)
        shard(ranks, self.model)
        self.averaged = {name: x.detach().clone() for name, x in self.trained()}
        identity = config.to_json() if identity is None else identity
        others = self.other_optimisers(settings, ranks)
        super().__init__(settings, identity, out, self._optimiser(settings, ranks), ranks, others)

    def prepare(self, settings: Any) -> None:
        """Change the fresh parts before anything else knows them."""

    def other_optimisers(self, settings: Any, ranks: Ranks) -> dict[str, Optimizer]:
        """Make further optimisers by name."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        """The generator's parts by name."""
        parts: dict[str, nn.Module] = {"model": self.model, "text": self.text}
        return parts if self.memory is None else parts | {"memory": self.memory}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the generator with its part's name in front."""
        for part, module in self.modules().items():
            for name, x in module.named_parameters():
                yield f"{part}.{name}", x

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of :meth:`parameters` that are trained."""
        return ((name, x) for name, x in self.parameters() if x.requires_grad)

    def start_from(self, name_or_folder: str) -> Checkpoint:
        """Take the weights of a model, as :meth:`start_from_checkpoint` does; return it."""
        loaded = load_checkpoint(name_or_folder)
        self.start_from_checkpoint(loaded)
        return loaded

    def start_from_checkpoint(self, loaded: Checkpoint) -> None:
        """Take the weights of a model; a memory that it lacks keeps its fresh start.

        Raises:
            ValueError: its parts have other shapes.
        """
        check_words(loaded)
        if loaded.config.model != self.config.model:
            raise ValueError(f"can't start from {loaded.config.model}: this run trains {self.config.model}")
        values = {f"model.{name}": x for name, x in loaded.model.state_dict().items()}
        values |= {f"text.{name}": x for name, x in loaded.text.state_dict().items()}
        if loaded.memory is not None:
            values |= {f"memory.{name}": x for name, x in loaded.memory.state_dict().items()}
        own = dict(self.parameters())
        values = {name: x for name, x in values.items() if name in own}
        shapes = [(name, tuple(x.shape), tuple(own[name].shape)) for name, x in values.items()]
        if wrong := [f"{name} {theirs}, not {ours}" for name, theirs, ours in shapes if theirs != ours]:
            raise ValueError(f"can't start from a model of other shapes: {'; '.join(wrong)}")
        self.assign(values)
        self.average_anew()

    def encode(self, prompts: Prompts) -> list[KV]:
        """Return each layer's K/V of prompts."""
        return encode_prompts(self.model, self.text, prompts)

    def average_anew(self) -> None:
        """Let the running averages start at the weights of now."""
        self.averaged = {name: x.detach().clone() for name, x in self.trained()}

    def average(self, decay: float) -> None:
        """Move the running averages towards the weights: ``decay`` of the old stays, less in the first steps."""
        decay = min(decay, (2 + self.step) / (11 + self.step))
        for part in self.modules():  # sharded and whole tensors don't mix in one call
            pairs = [(self.averaged[name], x.detach()) for name, x in self.trained() if name.startswith(f"{part}.")]
            if pairs:
                torch._foreach_lerp_([a for a, _ in pairs], [x for _, x in pairs], 1 - decay)

    def draw_noise(self, generator: torch.Generator, frames: int, batch: int | None = None) -> Tensor:
        """Draw the noise of a whole batch (by default the run's) and return this process's rows.

        Returns:
            ``(B, frames, C, h, w)``.
        """
        c, batch = self.config, self.settings.batch if batch is None else batch
        shape = (batch, frames, c.model.latent_channels, c.latent_rows, c.latent_columns)
        return torch.randn(shape, generator=generator)[self.ranks.rows(batch)].to(self.ranks.device)

    def streams(self, text: list[KV], batch: int) -> StreamPasses:
        """Start a batch of streams of the generator."""
        return StreamPasses(self.model, self.geometry, self.policy.recall(self.memory, self.config, batch), text)

    def watch_gates(self, stream: StreamPasses, wanted: bool) -> list[Tensor]:
        """Return a list that the gates of the stream's coming writes are put into, if they are wanted."""
        gates: list[Tensor] = []
        if isinstance(stream.recall, StreamMemory):
            stream.recall.gates = gates if wanted else None
        return gates

    def gate_statistics(self, gates: Sequence[Tensor]) -> dict[str, float]:
        """Return mean and standard deviation of the gates of all processes, for the log."""
        if not gates:
            return {}
        every = torch.stack([gate.double() for gate in gates])
        found = self.ranks.mean({"mean": every.mean().item(), "square": every.square().mean().item()})
        return {"gate_mean": found["mean"], "gate_std": max(0.0, found["square"] - found["mean"] ** 2) ** 0.5}

    def tensors(self) -> dict[str, Tensor]:
        """Weights and averaged weights."""
        named = {f"weights.{name}": x.detach() for name, x in self.parameters()}
        return named | {f"averaged.{name}": x for name, x in self.averaged.items()}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned.

        Raises:
            ValueError: lists every tensor that is missing or unexpected.
        """
        weights = {name.removeprefix("weights."): x for name, x in named.items() if name.startswith("weights.")}
        averaged = {name.removeprefix("averaged."): x for name, x in named.items() if name.startswith("averaged.")}
        own = dict(self.parameters())
        if wrong := sorted(own.keys() ^ weights.keys()) + sorted(self.averaged.keys() ^ averaged.keys()):
            raise ValueError(f"{self.checkpoint} doesn't fit this run; missing or unexpected: {', '.join(wrong)}")
        self.assign(weights)
        self.averaged = {name: spread(averaged[name], own[name]) for name in self.averaged}

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Copy whole tensors, or shards, into the parameters of those names."""
        own = dict(self.parameters())
        for name, x in values.items():
            own[name].copy_(x if type(x) is type(own[name].data) else spread(x, own[name]))

    def export(self, codec: Codec, folder: Path | None = None) -> Path:
        """Write the averaged weights as a model folder (by default ``out/model``) and return it."""
        folder = self.out / "model" if folder is None else folder
        parts = self.averaged_parts()
        if self.ranks.rank == 0:
            memory = parts.get("memory")
            save_checkpoint(folder, self.config, parts["model"], memory, parts["text"], codec)  # type: ignore[arg-type]
        return find(folder) if self.ranks.rank == 0 else folder

    def averaged_parts(self) -> dict[str, nn.Module]:
        """Return whole copies of the generator's parts with their averaged weights, on the CPU."""
        values = {name: whole(self.averaged.get(name, x)) for name, x in self.parameters()}
        parts: dict[str, nn.Module] = {
            "model": CausalDiT(self.config.model),
            "text": GrammarText(self.text.vocabulary, self.text.tokens, self.config.model.text_width),
        }
        if self.config.memory is not None:
            parts["memory"] = EvolvingMemory(self.config.memory)
        for name, part in parts.items():
            own = {n.removeprefix(f"{name}."): x for n, x in values.items() if n.startswith(f"{name}.")}
            part.load_state_dict(self.plain(own))
            part.eval().requires_grad_(False)
        return parts

    def plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a part's trained tensors into those of a plain module; here they are."""
        return state

    def _optimiser(self, settings: Any, ranks: Ranks) -> Optimizer:
        groups = []
        for part, module in self.modules().items():
            params = [x for x in module.parameters() if x.requires_grad]
            if params:
                groups.append({"params": params, "factor": settings.memory_rate if part == "memory" else 1.0})
        fused = ranks.world == 1  # which sharded tensors don't offer on every device
        return AdamW(groups, lr=settings.rate, betas=self.betas, weight_decay=0.01, fused=fused)
