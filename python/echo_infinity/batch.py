"""Streams that advance in step, in one batch: each is a stream of its own in all but the calls that make its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from echo_infinity.finite import NonFiniteError
from echo_infinity.rows import BatchSampler

if TYPE_CHECKING:
    from echo_infinity.stream import Stream


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
        self._finished: list[Tensor] = []  # of a step in which the rest could not be decoded

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
        for stream, x in zip(rest, latents, strict=True):  # what is finished stays there if the next can't be
            done.append(stream.finish(x))
        self._finished = []
        for stream, output in zip(self.streams, done, strict=True):
            stream.tell(output)
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
                    "this block: cut all of them, or none; saved ones can be resumed one at a time"
                )
            if all(cuts):
                frames = [stream.frames for stream in self.streams]
                self._sampler.cut([stream.shots.script.text_to_come for stream in self.streams])
                for stream, before in zip(self.streams, frames, strict=True):
                    stream.shots.enter(before)
            for stream in self.streams:
                stream.shots.begin_block()
            try:
                self._sampler.advance()
            except NonFiniteError as error:
                for stream in self.streams:
                    stream.fail(error)
                raise
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
