"""Every frame so far: the upper bound, for short rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from echo_infinity.cache import KV, Call
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.policies.policy import Policy
from echo_infinity.recall import Evicting, Recall

WINDOWS = 20


class FullAttention(Policy):
    """Every frame of the stream, at its own temporal id; time and state grow with the stream.

    A stream may have 20 times ``window_frames`` frames and then stops with an error: forgetting would be another
    policy. Ids go past the range that relative ids keep to.
    """

    name = "full"

    def _configure(self, config: EchoConfig) -> EchoConfig:
        w = config.window
        frames = WINDOWS * w.window_frames // w.frames_per_block * w.frames_per_block
        window = replace(w, sink_frames=0, window_frames=frames, p_max=frames, relative=True)
        return replace(config, memory=None, window=window)

    def recall(
        self, module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
    ) -> Recall | None:
        """Return a watch that refuses to forget."""
        return _NothingLeaves(config)

    def sliding_frames(self, config: EchoConfig) -> int:
        """Return the window of the configuration that this one was made of."""
        return self.configure(config).window.window_frames // WINDOWS

    def max_frames(self, config: EchoConfig) -> int | None:
        """Return the frames that the cache holds."""
        return self.configure(config).window.window_frames


class _NothingLeaves:
    frames, why_no_graph, active = 0, "every block sees more frames than the last", False

    def __init__(self, config: EchoConfig) -> None:
        self._limit = config.window.window_frames

    def prepare(self, cache: Evicting, call: Call) -> None:
        if call.slots.evicted.frames:
            raise ValueError(
                f"policy 'full' holds {self._limit} latent frames and forgets none: stop the stream before frame "
                f"{call.start}, or take another policy"
            )

    def publish(self) -> None:
        pass

    def read(self, call: Call) -> list[KV] | None:
        return None

    def rewrite(self, segments: list[KV], cache: Evicting) -> None:
        pass

    def detach(self) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        pass
