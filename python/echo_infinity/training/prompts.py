"""Prompts for stages that need no videos: from text files or from folders of clips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open


def load_prompts(paths: Sequence[Path]) -> list[str]:
    """Return the lines of text files that are not empty, and the prompts of folders' clips, in turn.

    Raises:
        ValueError: one of the paths has none.
    """
    return [prompt for path in paths for prompt in _prompts(path)]


def _prompts(path: Path) -> list[str]:
    prompts: list[str] = []
    if path.is_file():
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    for shard in sorted(path.glob("shard-*.safetensors")):
        with safe_open(shard, "pt") as file:
            prompts += [clip["prompt"] for clip in json.loads(file.metadata()["clips"])]
    if not prompts:
        raise ValueError(f"no prompts in {path}: give a text file, a prompt a line, or a folder made by 'train clips'")
    return prompts
