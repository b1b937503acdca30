"""Nothing but the last frames."""

from __future__ import annotations

from dataclasses import replace

from echo_infinity.config import EchoConfig
from echo_infinity.policies.policy import Policy


class WindowOnly(Policy):
    """The last ``window_frames`` frames, the current block included; frames that leave are forgotten, the first too."""

    name = "window"

    def _configure(self, config: EchoConfig) -> EchoConfig:
        return replace(config, memory=None, window=replace(config.window, sink_frames=0))
