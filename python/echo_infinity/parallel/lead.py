"""The first process runs the program; the others wait for what its streams ask of them, and do it at the same time."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import distributed

from echo_infinity.cache import KV
from echo_infinity.finite import NonFiniteError
from echo_infinity.model import TextKV
from echo_infinity.noise import Noise
from echo_infinity.parallel.sampler import LeadSampler, SplitSampler
from echo_infinity.parallel.split import Split

if TYPE_CHECKING:
    from echo_infinity.engine import Engine

T = TypeVar("T")
_PATIENCE = timedelta(days=365)  # the program may think between two blocks for as long as it likes
_SAME_EVERYWHERE = (NonFiniteError, ValueError)  # raised by all processes at the same point: they stay in step


class ProcessesError(RuntimeError):
    """The processes are out of step, since one failed or ended: streams can go on from their saved states only."""


class _Order(NamedTuple):
    name: str
    stream: int
    arguments: dict[str, Any]
    gone: list[int]  # streams that the program has dropped


class _TextShapes(NamedTuple):
    """What has to be known before a prompt's keys and values can be received."""

    shape: torch.Size
    dtype: torch.dtype
    padding: int


class Lead:
    """Where the first process's streams give their orders; the others' side is :meth:`follow`.

    Every process of the run must make it at the same time.

    Args:
        split: the shares.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.gone: list[int] = []
        self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._failure: BaseException | None = None

    def number(self) -> int:
        """A number for a new stream."""
        return next(self._numbers)

    def sampler(
        self, engine: Engine, memory: str, text: list[KV], noise: Noise, memory_dtype: torch.dtype | None
    ) -> LeadSampler:
        """Start a stream on all processes.

        Raises:
            ValueError: this is not the first process.
            ProcessesError: the processes are out of step.
        """
        if not self.split.first:
            raise ValueError(
                f"process {self.split.ranks.rank} starts no streams: run the program under echo_infinity.parallel.lead"
            )
        return LeadSampler(self, memory, engine.generator(memory), text, noise, memory_dtype=memory_dtype)

    @contextlib.contextmanager
    def order(self, name: str, stream: int, arguments: dict[str, Any]) -> Iterator[None]:
        """Tell the others what comes, then do it inside.

        Raises:
            ProcessesError: a process failed or ended, now or before.
        """
        with self._lock:
            if self._failure is not None:
                raise ProcessesError(
                    f"the processes fell out of step before: {self._failure}; resume from the last saved state"
                ) from self._failure
            try:
                self._tell(_Order(name, stream, arguments, [self.gone.pop() for _ in range(len(self.gone))]))
                yield
            except _SAME_EVERYWHERE:
                raise
            except BaseException as error:
                self._failure = error
                if not isinstance(error, RuntimeError):
                    raise
                reason = str(error).strip().splitlines()
                raise ProcessesError(
                    f"one of {self.split.world} processes failed or ended: {reason[0] if reason else error!r}; "
                    "resume from the last saved state"
                ) from error

    def leave(self) -> None:
        """Let the others go."""
        with self._lock:
            if self._failure is None:
                self._tell(_Order("leave", -1, {}, []))
                self._failure = RuntimeError("the program has ended")

    def follow(self, engine: Engine) -> None:
        """Do what the first process orders until it leaves.

        Raises:
            RuntimeError: another process ended without a word.
        """
        streams: dict[int, SplitSampler] = {}
        while (order := self._hear()).name != "leave":
            for number in order.gone:
                streams.pop(number, None)
            with contextlib.suppress(*_SAME_EVERYWHERE):
                if order.name == "start":
                    streams[order.stream] = self._start(engine, **order.arguments)
                else:
                    self._obey(streams[order.stream], order)

    def shapes(self, text: list[KV]) -> _TextShapes:
        """Describe a prompt's keys and values."""
        return _TextShapes(text[0][0].shape, text[0][0].dtype, getattr(text[0], "padding", 0))

    @torch.inference_mode()
    def send(self, text: list[KV]) -> None:
        """Send a prompt's keys and values, on the first process."""
        for x in itertools.chain.from_iterable(text):
            distributed.broadcast(x.contiguous(), src=0)

    def _start(
        self, engine: Engine, memory: str, batch: int, memory_dtype: torch.dtype | None, text: _TextShapes
    ) -> SplitSampler:
        received = _receive(text, engine.config.model.layers, engine.device)
        return SplitSampler(engine.generator(memory), received, None, self.split, batch, memory_dtype)

    def _obey(self, sampler: SplitSampler, order: _Order) -> None:
        given = order.arguments
        if order.name == "next":
            sampler.drawn = given["noise"]
            sampler.next_block()
        elif order.name in ("switch", "cut"):
            text = _receive(given["text"], len(sampler.text), sampler.generator.device)
            if order.name == "cut":
                sampler.cut(text)
            else:
                sampler.switch(text, **given["options"])
        elif order.name == "observe":
            sampler.observe(given["latents"].to(sampler.generator.device))
        elif order.name == "collect":
            sampler.collect()
        elif order.name == "take":
            sampler.take(None, given["common"], given["frame"])
        else:
            raise AssertionError(f"unknown order {order.name}")

    def _tell(self, order: _Order) -> None:
        distributed.broadcast_object_list([order], src=0, group=self._group, device=torch.device("cpu"))

    def _hear(self) -> _Order:
        box: list[Any] = [None]
        distributed.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]


def lead(engine: Engine, program: Callable[[], T]) -> T | None:
    """Run a program on the first process while the others do their share of its streams.

    Args:
        engine: loaded with ``ranks=join_ranks()`` on every process.
        program: starts and runs the engine's streams as on one process; called on the first process only.

    Returns:
        What ``program`` returned, on the first process; None on the others, when it has ended.

    Raises:
        RuntimeError: on the others, the first ended without a word.
    """
    if engine.lead is None:
        return program()
    if not engine.lead.split.first:
        engine.lead.follow(engine)
        return None
    try:
        return program()
    finally:
        engine.lead.leave()


def _receive(text: _TextShapes, layers: int, device: torch.device) -> list[KV]:
    received = []
    for _ in range(layers):
        pair = [torch.empty(text.shape, dtype=text.dtype, device=device) for _ in range(2)]
        for x in pair:
            distributed.broadcast(x, src=0)
        kv = TextKV(pair)
        kv.padding = text.padding
        received.append(kv)
    return list(received)
