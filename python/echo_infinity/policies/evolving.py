"""The model's own memory, written at every eviction: the method itself."""

from __future__ import annotations

import torch

from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.policies.policy import Policy
from echo_infinity.recall import Recall, keep_own


class Evolving(Policy):
    """Sink, evolving memory, window: frames that leave are written into the learned memory, which every layer reads.

    Source: docs/method.md sections 2 to 4.
    """

    name = "evolving"

    def configure(self, config: EchoConfig) -> EchoConfig:
        """Return ``config`` itself, which must have a memory."""
        if super().configure(config).memory is None:
            raise ValueError(f"policy 'evolving' needs a model with a memory, {config.name} has none")
        return config

    def _configure(self, config: EchoConfig) -> EchoConfig:
        return config

    def module(self, memory: EvolvingMemory | None) -> EvolvingMemory | None:
        """Return the memory."""
        return memory

    def recall(
        self, module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
    ) -> Recall | None:
        """Return the stream's side of the memory."""
        return keep_own(module, config, batch, dtype)
