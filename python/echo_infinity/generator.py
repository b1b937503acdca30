"""What many streams share: weights, tables, schedule and noise levels."""

from __future__ import annotations

from dataclasses import replace

import torch

from echo_infinity.cache import Geometry
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT, Conditioning
from echo_infinity.recall import RecallFactory, keep_own
from echo_infinity.schedule import FlowSchedule


class Generator:
    """What many streams share: weights, tables, schedule and noise levels.

    Args:
        config: geometry and sampler settings.
        model: the DiT.
        memory: the evolving memory; None streams without one.
        recall: makes each stream's side of what it keeps of frames that left its window; by default of ``memory``.
        kv: how streams keep keys and values, "full" or "fp8".

    Raises:
        ValueError: the memory is not the one that ``config`` describes, or ``config`` asks for a policy other than the
            model's own memory and ``recall`` is not given.
    """

    def __init__(
        self,
        config: EchoConfig,
        model: CausalDiT,
        memory: EvolvingMemory | None,
        recall: RecallFactory | None = None,
        *,
        kv: str = "full",
    ) -> None:
        s = config.sampler
        if recall is None and config.policy != "evolving":
            raise ValueError(
                f"the configuration's policy is {config.policy!r}: make its generator with "
                "echo_infinity.policies.make_generator"
            )
        if memory is not None and _thawed(memory.config) != _thawed(config.memory):
            raise ValueError(f"memory is {memory.config}, the configuration says {config.memory}")
        self.config, self.model, self.memory, self.kv = config, model, memory, kv
        self.recall = keep_own if recall is None else recall
        self._head = model.head.head
        self.device, self.dtype = self._head.weight.device, self._head.weight.dtype
        self.schedule = FlowSchedule(s.shift)
        self.timesteps = self.schedule.warp(s.steps) if s.warp else [float(t) for t in s.steps]
        self.geometry = Geometry(config, self.device)
        self._levels: dict[tuple[float, int], Conditioning] = {}
        self._made_with = self._weights_version()

    def level(self, t: float, frames: int = 0) -> Conditioning:
        """Return the conditioning of timestep ``t``, computed once, and anew after the weights have changed.

        Args:
            t: 0 .. 1000.
            frames: of a block whose first frame is given and clean; 0 where all frames are at ``t``.
        """
        if (version := self._weights_version()) != self._made_with:
            self._levels, self._made_with = {}, version
        if (key := (t, frames)) not in self._levels:
            timesteps = torch.full((1, frames or 1), t, device=self.device)
            if frames:
                timesteps[:, 0] = 0
            self._levels[key] = self.model.condition(timesteps)
        return self._levels[key]

    def _weights_version(self) -> int:
        """Counts in-place updates, as an optimiser or ``load_state_dict`` makes them to every weight."""
        return 0 if self._head.weight.is_inference() else self._head.weight._version


def _thawed(memory: MemoryConfig | None) -> MemoryConfig | None:
    """``memory`` that writes: freezing it is an ablation, not another geometry."""
    return memory and replace(memory, frozen=False)
