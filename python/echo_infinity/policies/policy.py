"""What every policy says: which frames attention sees, and what becomes of a frame that leaves the window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch

from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.recall import Recall


class Policy(ABC):
    """A way to spend the cache: a configuration, as far as one can say it, and what a stream keeps beside its window.

    A generator trained under a policy bears its name in its configuration and runs under that one only; one trained
    without a policy, or with the evolving memory, runs under any.
    """

    name: ClassVar[str]

    def configure(self, config: EchoConfig) -> EchoConfig:
        """Return the configuration of a generator under this policy; of one that is under it already, the same.

        Raises:
            ValueError: the generator was trained under another policy, or lacks what this one needs.
        """
        if config.policy == self.name:
            return config
        if config.policy != "evolving":
            raise ValueError(f"this generator was trained under the policy {config.policy!r}, not {self.name!r}")
        return replace(self._configure(config), policy=self.name)

    @abstractmethod
    def _configure(self, config: EchoConfig) -> EchoConfig:
        """The same for a generator under no policy yet."""

    def module(self, memory: EvolvingMemory | None) -> EvolvingMemory | None:
        """Return the model's own memory as this policy uses it; here not at all."""
        return None

    def recall(
        self, module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
    ) -> Recall | None:
        """Return what one stream keeps of frames that left its window; here nothing.

        Args:
            module: from :meth:`module`.
            config: from :meth:`configure`.
            batch: ``B``.
            dtype: of the evolving memory's state; default its weights'.
        """
        return None

    def sliding_frames(self, config: EchoConfig) -> int:
        """Latent frames of the window that slides in policies compared with this one: what absences are counted in."""
        return config.window.window_frames

    def max_frames(self, config: EchoConfig) -> int | None:
        """Latent frames that a stream may have, or None: it runs for ever at constant cost."""
        return None
