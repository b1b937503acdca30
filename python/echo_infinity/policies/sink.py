"""The first frames and the last: attention sinks."""

from __future__ import annotations

from dataclasses import replace

from echo_infinity.config import EchoConfig
from echo_infinity.policies.policy import Policy


class SinkWindow(Policy):
    """The first ``sink_frames`` frames for ever and the last ``window_frames - sink_frames``, the current block
    included; frames that leave are forgotten."""

    name = "sink"

    def _configure(self, config: EchoConfig) -> EchoConfig:
        return replace(config, memory=None)
