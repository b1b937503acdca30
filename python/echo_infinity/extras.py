"""Libraries of the optional extras, imported when they are first needed."""

from __future__ import annotations

import importlib
from types import ModuleType

# What each extra's library is needed for; pyproject.toml has the versions.
_EXTRAS = {
    "transformers": "wan",
    "diffusers": "wan",
    "ftfy": "wan",
    "ray": "ray",
    "PIL.Image": "image",
    "PIL.ImageOps": "image",
}


class MissingExtraError(ImportError):
    """An optional library is not installed; the message says how to install it."""


def library(name: str, purpose: str) -> ModuleType:
    """Import an optional library.

    Args:
        name: the module's.
        purpose: what needs it, for the message.

    Raises:
        MissingExtraError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {name}, which can't be imported ({error}); run: "
            f"pip install 'echo-infinity[{_EXTRAS[name]}]'"
        ) from error
