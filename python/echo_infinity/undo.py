"""Back to a block's start: what it overwrites is kept until it is done, so that running out of memory loses nothing."""

from __future__ import annotations

from torch import Tensor

from echo_infinity.cache import Call, RingKV
from echo_infinity.recall import StreamMemory


class BlockUndo:
    """What a block's calls change and a second try at the block needs.

    A block writes its own slots of the cache anew, whatever they hold, so only the frames that it pushes out matter,
    and only where the memory is written from them: a copy of those, and of the memory's state.

    Args:
        cache: the stream's.
        memory: the stream's, or None.
        call: plan of the block.
    """

    def __init__(self, cache: RingKV, memory: StreamMemory | None, call: Call) -> None:
        self._memory = memory
        self._slots: list[tuple[Tensor, Tensor]] = []
        if memory is not None:
            self._slots = [(view, view.clone()) for pair in cache.evicted(call) for view in pair]
            self._before, self._state, self._pending = memory.bookmark(), memory.state.clone(), list(memory.pending)

    def back(self) -> None:
        """Restore the stream to where the block began."""
        if self._memory is None:
            return
        for view, saved in self._slots:
            view.copy_(saved)
        self._memory.back_to(self._before)
        self._memory.pending = self._pending
        if self._memory.writes:  # a fixed state was written in place; a learned start never is
            self._memory.replace(self._state)
