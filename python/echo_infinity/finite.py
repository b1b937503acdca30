"""Notice NaN and Inf without making the host wait for the device."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

_AHEAD = 8  # blocks that may be under way before their answers are read


class NonFiniteError(RuntimeError):
    """A block came out with NaN or Inf; the stream stopped. A state saved before it is the last good one."""


def is_finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither NaN nor Inf; found on the CPU where the device has no room for the answer."""
    try:
        return bool(torch.isfinite(x).all())
    except torch.OutOfMemoryError:
        return bool(torch.isfinite(x.cpu()).all())


class FiniteWatch:
    """Ask of every block whether it is finite; on a GPU the answer is read when it is there.

    On the CPU :meth:`note` raises at once. On a GPU it leaves a copy of the answer under way, and the block's own
    :meth:`check` with ``wait`` (when its pixels are read anyway) or a later block's without raises.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        self._lock = threading.Lock()

    def note(self, x: Tensor, block: int) -> None:
        """Ask whether ``x``, block number ``block``, is finite.

        Raises:
            NonFiniteError: on the CPU, it is not.
        """
        finite = torch.isfinite(x).all()
        if x.device.type != "cuda":
            _raise_unless(bool(finite), block)
            return
        if len(self._under_way) >= _AHEAD:
            self.check(wait=True)
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(x.device))
        with self._lock:
            self._under_way.append((block, answer, event))

    def check(self, *, wait: bool = False) -> None:
        """Read the answers that are there, or with ``wait`` all of them.

        Raises:
            NonFiniteError: a block was not finite.
        """
        with self._lock:
            while self._under_way and (wait or self._under_way[0][2].query()):
                block, answer, event = self._under_way.popleft()
                if wait:
                    event.synchronize()
                _raise_unless(bool(answer), block)


class NoWatch(FiniteWatch):
    """Asks nothing: another process does."""

    def note(self, x: Tensor, block: int) -> None:
        """Let it pass."""

    def check(self, *, wait: bool = False) -> None:
        """Let it pass."""


def _raise_unless(finite: bool, block: int) -> None:
    if not finite:
        raise NonFiniteError(
            f"block {block} holds NaN or Inf after denoising; resume from the last saved state, "
            "in float32 if the stream ran in a narrower dtype"
        )
