"""Prompts for stages that need no videos: from a text file or from a folder of clips."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open


def load_prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty, or the prompts of a folder's clips.

    Raises:
        ValueError: there are none.
    """
    prompts: list[str] = []
    if path.is_file():
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    for shard in sorted(path.glob("shard-*.safetensors")):
        with safe_open(shard, "pt") as file:
            prompts += [clip["prompt"] for clip in json.loads(file.metadata()["clips"])]
    if not prompts:
        raise ValueError(f"no prompts in {path}: give a text file, a prompt a line, or a folder made by 'train clips'")
    return prompts
