"""Prompts from a file or from clips."""

import json

import pytest
import torch
from echo_infinity.training.prompts import load_prompts
from safetensors.torch import save_file


def test_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one circle\n\n  two squares  \n")
    assert load_prompts([file]) == ["one circle", "two squares"]


def test_prompts_of_clips_without_their_latents(tmp_path):
    for i in (1, 0):
        clips = json.dumps([{"prompt": f"{i} a"}, {"prompt": f"{i} b"}])
        save_file({"latents": torch.zeros(2)}, tmp_path / f"shard-{i:05d}.safetensors", metadata={"clips": clips})
    (tmp_path / "more.txt").write_text("2 c\n")
    assert load_prompts([tmp_path, tmp_path / "more.txt"]) == ["0 a", "0 b", "1 a", "1 b", "2 c"]


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no prompts in"):
        load_prompts([tmp_path])
