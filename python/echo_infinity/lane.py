"""A second lane of work on a GPU: decoding there runs beside the next block instead of behind it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Lane:
    """Order between a stream's blocks and their decoding; on the CPU, threads alone do that and this does nothing.

    The main lane calls :meth:`made` when it has queued a block, the decoder runs inside :meth:`use` and must have its
    result on the host before it leaves: then nothing that it read can be overwritten under it.

    Args:
        device: of the stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: Any = None  # torch.cuda.Stream, untyped
        self._events: deque[Any] = deque()

    def made(self) -> None:
        """Mark the point in the main lane's work at which the newest block is there."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)

    @contextlib.contextmanager
    def use(self, latents: Tensor) -> Iterator[None]:
        """Queue what is inside behind the oldest marked block, and behind nothing later.

        Args:
            latents: that block's, which the main lane allocated.
        """
        if self._device.type != "cuda":
            yield
            return
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        if self._events:
            self._side.wait_event(self._events.popleft())
        else:  # the caller's own latents: whatever made them is in the current lane
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            if latents.device.type == "cuda":
                latents.record_stream(self._side)
            yield
