"""The memory at its learned start: the paper's ablation of what writing brings."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.policies.policy import Policy
from echo_infinity.recall import Recall, keep_own


class Frozen(Policy):
    """Sink, memory at its learned start, window: frames that leave are forgotten.

    The start is read from the block on in which the evolving memory would first be active.

    Source: docs/method.md section 4, ablations.
    """

    name = "frozen"

    def _configure(self, config: EchoConfig) -> EchoConfig:
        if config.memory is None:
            raise ValueError(f"policy 'frozen' needs a model with a memory, {config.name} has none")
        return replace(config, memory=replace(config.memory, frozen=True))

    def module(self, memory: EvolvingMemory | None) -> EvolvingMemory | None:
        """Return the same weights under a configuration whose writes change nothing."""
        if memory is None:
            return None
        frozen = copy.copy(memory)
        frozen.config = replace(memory.config, frozen=True)
        return frozen

    def recall(
        self, module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
    ) -> Recall | None:
        """Return the stream's side of the memory."""
        return keep_own(module, config, batch, dtype)
