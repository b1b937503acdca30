"""A stream's sampler on each of several processes, and the one of the process that leads."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from echo_infinity.cache import KV, Call, RingKV
from echo_infinity.finite import NoWatch
from echo_infinity.generator import Generator
from echo_infinity.model import Conditioning
from echo_infinity.noise import Noise
from echo_infinity.parallel.ring import SplitFp8Ring, SplitRing
from echo_infinity.parallel.split import Split
from echo_infinity.sampler import BlockSampler, memory_part

if TYPE_CHECKING:
    from echo_infinity.parallel.lead import Lead


class SplitSampler(BlockSampler):
    """A process's side of a stream: every process makes every block, of its own tokens and heads.

    Latents, noise and memory state are whole on each; they are small, and so is the memory's write.

    Args:
        generator: weights and tables.
        text: per layer K/V of the prompt.
        noise: the stream's, on the first process; None elsewhere, where it comes with the order.
        split: the shares.
        batch: ``B``.
        memory_dtype: of the memory state; default the weights'.
    """

    undoes = False  # the others would not know

    def __init__(
        self,
        generator: Generator,
        text: list[KV],
        noise: Noise | None,
        split: Split,
        batch: int = 1,
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        self.split = split
        self.drawn: list[Tensor] = []  # noise of the coming block
        super().__init__(generator, text, noise or _with_the_order, batch, memory_dtype, graphs=False)
        if not split.first:
            self.finite = NoWatch()

    @torch.inference_mode()
    def collect(self) -> dict[str, Tensor]:
        """All heads of the cache on the first process's CPU, beside what every process has whole; the others join in.

        Returns:
            What :meth:`BlockSampler.tensors` of one process would, on the first; nothing on the others.
        """
        whole = {f"cache.{name}": self.split.gather_heads(x) for name, x in self.cache.tensors().items()}
        if not self.split.first:
            return {}
        return {**{name: x for name, x in whole.items() if x is not None}, **self._common()}

    @torch.inference_mode()
    def take(self, caches: Mapping[str, Tensor] | None, common: Mapping[str, Tensor], frame: int) -> None:
        """Go on from what :meth:`collect` gave on the first process.

        Args:
            caches: the cache's tensors by name, on the first process.
            common: the rest, everywhere.
            frame: the stream's place.
        """
        if self.memory is not None:
            self.memory.load_tensors(memory_part(common, self.generator.device))
        self.window.copy_(common["window"])
        for name, x in self.cache.tensors().items():
            self.split.scatter_heads(x, None if caches is None else caches[f"cache.{name}"])
        self.frame = frame

    def draw(self, step: int) -> Tensor:
        """Noise of the coming block, as it came with the order."""
        return self.drawn[step].to(self.generator.device, non_blocking=True)

    def _common(self) -> dict[str, Tensor]:
        memory = {} if self.memory is None else {f"memory.{k}": x for k, x in self.memory.tensors().items()}
        return {"window": self.window} | memory

    def _make_cache(self) -> RingKV:
        g = self.generator
        ring = SplitFp8Ring if g.kv == "fp8" else SplitRing
        return ring(g.config, self.batch, g.dtype, g.device, split=self.split)

    def _predict(
        self, x: Tensor, level: Conditioning, call: Call, memory: list[KV] | None, *, output: bool
    ) -> Tensor | None:
        model = self.generator.model
        own = self.split.own_tokens(model.patchify(x))
        own_flow = model.transform(own, level, self.text, self.cache, call, memory, output=output)
        return None if own_flow is None else model.unpatchify(self.split.all_tokens(own_flow), x.shape)


class LeadSampler(SplitSampler):
    """The first process's: it tells the others what to do before it does the same."""

    def __init__(
        self,
        lead: Lead,
        memory: str,
        generator: Generator,
        text: list[KV],
        noise: Noise,
        batch: int = 1,
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(generator, text, noise, lead.split, batch, memory_dtype)
        self._lead, self._number = lead, lead.number()
        with self._order("start", memory=memory, batch=batch, memory_dtype=memory_dtype, text=lead.shapes(text)):
            lead.send(text)
        weakref.finalize(self, lead.gone.append, self._number)

    def observe(self, latents: Tensor) -> None:
        """Take a block as given, on every process."""
        with self._order("observe", latents=latents.cpu()):
            super().observe(latents)

    def cut(self, text: list[KV]) -> None:
        """Begin a new shot, on every process."""
        with self._order("cut", text=self._lead.shapes(text)):
            self._lead.send(text)
            super().cut(text)

    def start_from(self, image: Tensor) -> None:
        """Refuse: tokens are shared out across frames, and a given frame has a noise level of its own.

        Raises:
            ValueError: always.
        """
        raise ValueError("a stream that starts from an image runs on one process: start it without torchrun")

    def switch(self, text: list[KV], *, global_sink: bool = True, memory_recache: bool = False) -> Tensor | None:
        """Change the prompt, on every process."""
        options = {"global_sink": global_sink, "memory_recache": memory_recache}
        with self._order("switch", options=options, text=self._lead.shapes(text)):
            self._lead.send(text)
            return super().switch(text, **options)

    def tensors(self) -> dict[str, Tensor]:
        """Collect the stream from all processes: what one process alone would hold."""
        with self._order("collect"):
            return self.collect()

    def load_tensors(self, named: Mapping[str, Tensor], frame: int, first_block: int = 0) -> None:
        """Go on, on every process, from what :meth:`tensors` or that of one process returned."""
        if "image" in named:
            self.start_from(named["image"])
        whole = {f"cache.{name}": _all_heads(x, self.split.world) for name, x in self.cache.tensors().items()}
        given = self._checked(named, whole | {"window": self.window.shape})
        memory = {name: x.cpu() for name, x in named.items() if name.startswith("memory.")}
        common = {"window": given.pop("window").cpu()} | memory
        with self._order("take", common=common, frame=frame):
            self.take(given, common, frame)
        self.first_block = first_block

    def _next(self) -> Tensor:
        noise = [self.noise(self.block, step, self._shape) for step in range(self.draws)]
        with self._order("next", noise=noise):
            self.drawn = noise
            return super()._next()

    def _order(self, name: str, **arguments: Any) -> Any:
        return self._lead.order(name, self._number, arguments)


def _with_the_order(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
    raise AssertionError("noise comes from the first process, with each order")


def _all_heads(x: Tensor, world: int) -> torch.Size:
    return torch.Size((*x.shape[:2], x.shape[2] * world, *x.shape[3:]))
