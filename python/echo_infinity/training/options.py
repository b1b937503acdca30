"""Settings of a training stage: a dataclass, a file for each preset and stage, and options that override it."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")


def add_settings(parser: argparse.ArgumentParser, cls: type, stage: str) -> None:
    """Add ``--config`` and an option for every field of a settings dataclass.

    Args:
        parser: to add to.
        cls: a dataclass whose fields are bool, int, float, str or tuples of float.
        stage: name of the stage's files.
    """
    names = ", ".join(sorted(p.parent.name for p in _folder().glob(f"*/{stage}.json")))
    parser.add_argument("--config", help=f"settings: a JSON file, or bundled ones, say tiny/teacher; a preset: {names}")
    for field in fields(cls):
        name = "--" + field.name.replace("_", "-")
        kind: Any = type(field.default)
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(name, type=_numbers if kind is tuple else kind, default=None)


def read_settings(cls: type[S], args: argparse.Namespace, stage: str) -> S:
    """Return the settings: the dataclass's defaults, under the file, under the options.

    Raises:
        ValueError: no such file, not JSON, or a setting that this stage doesn't have.
    """
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {} if args.config is None else _read(args.config, stage)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"{args.config}: stage {stage!r} has no setting {', '.join(unknown)}")
    given = {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    values |= given
    return cls(**{name: _as(type(known[name].default), value) for name, value in values.items()})


def _read(name: str, stage: str) -> dict[str, Any]:
    places = Path(name), _folder() / name / f"{stage}.json", _folder() / f"{name}.json"
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"no settings {name!r}: neither a file nor bundled settings of a preset for {stage!r}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _as(kind: type, value: Any) -> Any:
    return tuple(value) if kind is tuple else kind(value)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


def _folder() -> Path:
    return Path(str(files("echo_infinity"))) / "training" / "configs"
