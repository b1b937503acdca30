"""Streams that advance in step, in one batch: each is a stream of its own in all but the calls that make its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echo_infinity.cache import KV
from echo_infinity.finite import FiniteWatch
from echo_infinity.generator import Generator
from echo_infinity.model import TextKV
from echo_infinity.noise import Noise
from echo_infinity.sampler import BlockSampler

if TYPE_CHECKING:
    from echo_infinity.stream import Stream

_SECOND = ("memory.state", "memory.k", "memory.v")  # whose first dimension counts groups or layers


class BatchSampler:
    """The sampler of all rows, and what each of them waits for.

    Args:
        generator: weights and tables.
        texts: per layer K/V of each row's prompt.
        noises: each row's.
        memory_dtype: of the memory state; default the weights'.
    """

    def __init__(
        self,
        generator: Generator,
        texts: Sequence[list[KV]],
        noises: Sequence[Noise],
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        self.texts, self.noises, self.memory_dtype = list(texts), list(noises), memory_dtype
        self.whole = BlockSampler(generator, _join_texts(self.texts), self._draw, len(texts), memory_dtype)
        self.blocks: list[Tensor | None] = [None] * len(texts)  # made and not taken yet
        self._given: dict[int, tuple[dict[str, Tensor], int, int]] = {}  # saved rows that wait for the others
        self._images: dict[int, Tensor] = {}
        self._cuts: dict[int, list[KV]] = {}

    def rows(self) -> list[RowSampler]:
        """Each row as a stream's sampler."""
        return [RowSampler(self, row) for row in range(len(self.texts))]

    def advance(self) -> None:
        """Make every row's next block.

        Raises:
            ValueError: a row has not taken its block, or some rows have an image to start from and others don't.
            NonFiniteError: a row's block holds NaN or Inf; all of them may be spoilt.
        """
        count = len(self.texts)
        if any(block is not None for block in self.blocks):
            raise ValueError("a stream of the batch has not taken its block: take one of each")
        if 0 < len(self._images) < count:
            raise ValueError(
                f"streams {sorted(self._images)} of a batch of {count} start from an image: all must, or none"
            )
        if len(self._cuts) == count:
            for row, text in self._cuts.items():
                self.texts[row] = text
            self.whole.cut(_join_texts(self.texts))
            self._cuts = {}
        if self._images:
            self.whole.start_from(torch.cat([self._images[row] for row in range(count)]))
            self._images = {}
        made = self.whole.next_block()
        self.blocks = [made[row : row + 1] for row in range(count)]

    def cut(self, row: int, text: list[KV]) -> None:
        """Ask for a new shot in a row; all rows must before the next block."""
        self._cuts[row] = text

    def start_from(self, row: int, image: Tensor) -> None:
        """Ask for a row's first frame ``(1, 1, C, h, w)``; all rows must before the next block."""
        self._images[row] = image

    def tensors(self, row: int) -> dict[str, Tensor]:
        """A row's share of :meth:`BlockSampler.tensors`, as views."""
        named = {name: _row(name, x, row) for name, x in self.whole.tensors().items()}
        return named | ({"image": self._images[row]} if row in self._images else {})

    def load(self, row: int, named: Mapping[str, Tensor], frame: int, first_block: int) -> None:
        """Take a saved row; with the last of them the batch goes on from there.

        Raises:
            ValueError: the rows stand at different blocks, or as :meth:`BlockSampler.load_tensors`.
        """
        self._given[row] = {name: x for name, x in named.items() if name != "image"}, frame, first_block
        if "image" in named:
            self.start_from(row, named["image"])
        if len(self._given) < len(self.texts):
            return
        given, self._given = [self._given[i] for i in range(len(self.texts))], {}
        if places := {(at, first) for _, at, first in given} - {given[0][1:]}:
            raise ValueError(
                f"the streams stand at different blocks, frames {sorted({given[0][1], *(at for at, _ in places)})} of "
                "their shots: resume them one at a time"
            )
        self._load([tensors for tensors, _, _ in given], frame, first_block)

    def switch(self, row: int, text: list[KV], *, global_sink: bool, memory_recache: bool) -> None:
        """Change a row's prompt as :meth:`BlockSampler.switch` does, the row taken out of the batch for it."""
        self.texts[row] = text
        if self.whole.frame:
            g, whole = self.whole.generator, self.whole
            single = BlockSampler(g, text, self.noises[row], memory_dtype=self.memory_dtype, graphs=False)
            single.load_tensors(self.tensors(row), whole.frame, whole.first_block)
            single.switch(text, global_sink=global_sink, memory_recache=memory_recache)
            changed = single.tensors()
            del single
            every = [changed if i == row else self.tensors(i) for i in range(len(self.texts))]
            self._load(every, whole.frame, whole.first_block)
        self.whole.text = _join_texts(self.texts)

    def _load(self, rows: Sequence[Mapping[str, Tensor]], frame: int, first_block: int) -> None:
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError("the saved streams hold different tensors: resume them one at a time")
        joined = {
            name: x if x.ndim == 0 else torch.cat([row[name] for row in rows], dim=_dim(name))
            for name, x in rows[0].items()
        }
        self.whole.load_tensors(joined, frame, first_block)

    def _draw(self, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([noise(block, step, (1, *shape[1:])) for noise in self.noises])


class RowSampler:
    """A row of a batch where a stream expects its sampler; :class:`StreamBatch` makes the blocks.

    Args:
        batch: of all rows.
        row: which.
    """

    def __init__(self, batch: BatchSampler, row: int) -> None:
        self._batch, self._row = batch, row

    @property
    def generator(self) -> Generator:
        """Weights and tables."""
        return self._batch.whole.generator

    @property
    def finite(self) -> FiniteWatch:
        """Whether blocks held NaN; of all rows."""
        return self._batch.whole.finite

    @property
    def frame(self) -> int:
        """The shot's next frame."""
        return self._batch.whole.frame

    @property
    def block(self) -> int:
        """Number of the next block."""
        return self._batch.whole.block

    def next_block(self) -> Tensor:
        """Take the block that the batch has made, ``(1, F, C, h, w)``.

        Raises:
            ValueError: there is none.
        """
        block, self._batch.blocks[self._row] = self._batch.blocks[self._row], None
        if block is None:
            raise ValueError("this stream advances with its batch: iterate the StreamBatch, or fork() the stream")
        return block

    def switch(self, text: list[KV], *, global_sink: bool = True, memory_recache: bool = False) -> None:
        """Change the row's prompt."""
        self._batch.switch(self._row, text, global_sink=global_sink, memory_recache=memory_recache)

    def cut(self, text: list[KV]) -> None:
        """Begin a new shot."""
        self._batch.cut(self._row, text)

    def start_from(self, image: Tensor) -> None:
        """Give the row's first frame."""
        self._batch.start_from(self._row, image)

    def tensors(self) -> dict[str, Tensor]:
        """The row's tensors, as a stream of its own would have them."""
        return self._batch.tensors(self._row)

    def load_tensors(self, named: Mapping[str, Tensor], frame: int, first_block: int = 0) -> None:
        """Go on from saved tensors, once all rows have theirs."""
        self._batch.load(self._row, named, frame, first_block)


class StreamBatch:
    """Streams in step; made by :meth:`EchoPipeline.batch` and :meth:`EchoPipeline.resume_batch`.

    Iterate to get the next block of each as a list. Each stream can be switched, saved and forked by itself; forks and
    resumed saves are no longer bound to the others.

    Args:
        sampler: of all rows.
        streams: one a row.
    """

    def __init__(self, sampler: BatchSampler, streams: Sequence[Stream]) -> None:
        self._sampler, self.streams = sampler, list(streams)
        self._finished: list[Tensor] = []  # of a step in which there was no memory to decode the rest

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self

    def __next__(self) -> list[Tensor]:
        """Generate a block of each stream; as iterating a :class:`Stream` does.

        Raises:
            NonFiniteError: NaN or Inf in one of them.
            StopIteration: a stream is closed.
            ValueError: more blocks of one stream than of another wait to be decoded.
        """
        if any(stream.closed for stream in self.streams):
            raise StopIteration
        done = self._finished
        owed = [len(stream.waiting) + (i < len(done)) for i, stream in enumerate(self.streams)]
        if any(count != owed[0] for count in owed):
            raise ValueError(f"{owed} blocks of the streams wait to be decoded: decode() them, stream by stream, first")
        rest = self.streams[len(done) :]
        latents = [stream.waiting[0] for stream in rest] if owed[0] else self.next_latents()
        try:  # what is finished stays in the list when there is no memory to finish the next
            done.extend(stream.finish(x) for stream, x in zip(rest, latents, strict=True))
        except Exception as error:
            if not isinstance(error, torch.OutOfMemoryError):
                self._finished = []
            raise
        self._finished = []
        return done

    def next_latents(self) -> list[Tensor]:
        """Generate a block of each and leave the decoding to the caller, as :meth:`Stream.next_latents` does.

        Raises:
            NonFiniteError: NaN or Inf in one of them.
            ValueError: some are to be cut at this block and others not; nothing has changed.
        """
        with ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(stream.lock)
            cuts = [stream.look_ahead() for stream in self.streams]
            if any(cuts) and not all(cuts):
                raise ValueError(
                    f"streams {[i for i, cut in enumerate(cuts) if cut]} of a batch of {len(cuts)} are to be cut at "
                    "this block: cut all of them, or none"
                )
            for stream in self.streams:
                stream.begin_block()
            self._sampler.advance()
            return [stream.take_block() for stream in self.streams]

    def close(self) -> None:
        """Stop all of them."""
        for stream in self.streams:
            stream.close()

    def __enter__(self) -> StreamBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _dim(name: str) -> int:
    return 1 if name in _SECOND else 0


def _row(name: str, x: Tensor, row: int) -> Tensor:
    return x if x.ndim == 0 else x.narrow(_dim(name), row, 1)


def _join_texts(texts: Sequence[list[KV]]) -> list[KV]:
    joined = []
    for layer in zip(*texts, strict=True):
        kv = TextKV([torch.cat([x[i] for x in layer]) for i in (0, 1)])
        kv.padding = min(getattr(x, "padding", 0) for x in layer)  # what is padding in every row
        joined.append(kv)
    return list(joined)
