"""What an evaluation has measured so far, on disk: JSON lines that survive a kill, and the settings they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_infinity.record import append_line

Row = dict[str, Any]


class Journal:
    """An append-only file of rows; the first line holds the settings that every row was measured with.

    Args:
        path: made where it is missing, with its folder.
        settings: JSON values; everything that a row's value depends on.

    Raises:
        ValueError: the file was written with other settings, or is no journal.
        OSError: it can't be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        own = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if not lines:
            append_line(path, json.dumps({"settings": own}) + "\n")
            self.rows: list[Row] = []
            return
        theirs = lines[0].get("settings")
        if theirs is None:
            raise ValueError(f"{path} does not begin with its settings: no journal of an evaluation")
        if theirs != own:
            names = sorted(k for k in theirs.keys() | own.keys() if theirs.get(k) != own.get(k))
            different = ", ".join(f"{k} (then {theirs.get(k)!r}, now {own.get(k)!r})" for k in names)
            raise ValueError(
                f"{path} was measured with other settings: {different}; give another --out or --name, or --restart"
            )
        self.rows = lines[1:]

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows, all of them or, if the process is killed, a whole number of them."""
        for row in rows:
            append_line(self.path, json.dumps(row) + "\n")
        self.rows += rows

    def latest(self, *keys: str) -> list[Row]:
        """Return the rows in order, of those with the same values of ``keys`` the last one at the first one's place."""
        return list({tuple(row[key] for key in keys): row for row in self.rows}.values())


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a journal, none where there is no file."""
    return _whole_lines(path)[1:]


def read_settings(path: Path) -> Row:
    """Return the settings of a journal, empty where there is no file."""
    lines = _whole_lines(path)
    return lines[0].get("settings", {}) if lines else {}


def _whole_lines(path: Path) -> list[Row]:
    """Parse a file's lines; what a kill left of the last one is cut off, so that the next line starts afresh."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with open(path, "rb+") as file:
            file.truncate(end)
    try:
        return [json.loads(line) for line in data[:end].splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a line that is no JSON: {error}") from error
