"""Endless text-to-video streams with an evolving memory, at constant cost a block."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_infinity.config import EchoConfig, preset
    from echo_infinity.finite import NonFiniteError
    from echo_infinity.pipeline import EchoPipeline
    from echo_infinity.state import ResumeWarning
    from echo_infinity.stream import Stream

__all__ = ["EchoConfig", "EchoPipeline", "NonFiniteError", "ResumeWarning", "Stream", "preset"]

_HOMES = {
    "EchoConfig": "config",
    "EchoPipeline": "pipeline",
    "NonFiniteError": "finite",
    "ResumeWarning": "state",
    "Stream": "stream",
    "preset": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line answers without loading torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
