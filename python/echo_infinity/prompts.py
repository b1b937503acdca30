"""Prompt schedules: which prompt is in effect from when on, as a file says."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"(?:\[(?P<time>[^\]]*)\])?\s*(?P<cut>\|)?\s*(?P<prompt>.*)")
_TIME = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?\s*(?:(?P<m>\d+(?:\.\d+)?)m)?\s*(?:(?P<s>\d+(?:\.\d+)?)(?P<u>s)?)?")
_FORM = "a line is '[TIME] prompt', TIME such as 30s, 1m30s or 2h, or '[TIME] | prompt' for a hard cut"


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt and when it takes effect: at the first block that starts at ``seconds`` or later.

    Args:
        seconds: of the stream.
        prompt: the text.
        cut: a hard cut, to a new shot: nothing of what was shown before is seen or remembered.
    """

    seconds: float
    prompt: str
    cut: bool = False


def read_schedule(path: str | os.PathLike[str]) -> tuple[TimedPrompt, ...]:
    """Read a schedule from a text file; see :func:`parse_schedule`.

    Raises:
        OSError: the file can't be read.
        ValueError: as :func:`parse_schedule`, or the file is no UTF-8 text.
    """
    try:
        return parse_schedule(Path(path).read_text(encoding="utf-8-sig"))  # Windows begins files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def parse_schedule(text: str) -> tuple[TimedPrompt, ...]:
    """Parse a schedule, a prompt a line; empty lines and lines that begin with ``#`` don't count.

    The first line's time may be left out: it is 0. ``|`` after the time makes a hard cut.

    Raises:
        ValueError: names the line: no time, an unreadable one, or one not after the line before; no prompt; no line.
    """
    prompts: list[TimedPrompt] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        assert match is not None
        prompt = match["prompt"].strip()
        if not prompt or "|" in prompt:
            raise ValueError(f"line {number}: {line!r} holds {'more than one |' if prompt else 'no prompt'}; {_FORM}")
        if match["time"] is None and prompts:
            raise ValueError(f"line {number}: {line!r} has no time; {_FORM}")
        seconds = 0.0 if match["time"] is None else _seconds(match["time"], number)
        if not prompts and seconds:
            raise ValueError(f"line {number}: the first prompt must start at 0s, not {seconds:g}s")
        if prompts and seconds <= prompts[-1].seconds:
            raise ValueError(
                f"line {number}: {seconds:g}s is not after the line before, {prompts[-1].seconds:g}s; sort them by time"
            )
        prompts.append(TimedPrompt(seconds, prompt, match["cut"] is not None))
    if not prompts:
        raise ValueError(f"it holds no prompt: {_FORM}")
    return tuple(prompts)


def due(prompts: Sequence[TimedPrompt], seconds: float) -> int:
    """Return how many of the prompts, in order of time, are to be in effect by ``seconds``."""
    return sum(prompt.seconds <= seconds for prompt in prompts)


def _seconds(text: str, line: int) -> float:
    match = _TIME.fullmatch(text.strip())
    if match is None or not any(match.groups()) or (match["h"] and not match["m"] and match["s"] and not match["u"]):
        raise ValueError(f"line {line}: can't read the time {text!r}; {_FORM}")
    return sum(float(match[unit] or 0) * scale for unit, scale in (("h", 3600), ("m", 60), ("s", 1)))
