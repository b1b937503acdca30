"""The benchmark of generator and decoder beside each other: what it times has run."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    yield runpy.run_path(str(BENCH / "end_to_end.py"))["beside"]
    for name in ("clock", "full_geometry"):
        sys.modules.pop(name, None)


def stream(failing):
    """A sampler, and a codec that can't decode block ``failing``."""
    seen = []

    def decode(latents, state):
        seen.append(latents)
        if len(seen) == failing:
            raise ValueError(f"block {failing}")
        return torch.zeros(1, 4, 3, 2, 2), state

    return SimpleNamespace(next_block=lambda: torch.zeros(1, 1)), SimpleNamespace(decode=decode), seen


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_block_that_is_not_decoded_fails_the_run(beside, failing):
    sampler, codec, _ = stream(failing)
    with pytest.raises(ValueError, match=f"block {failing}"):
        beside(sampler, codec, 3, "cpu")


def test_every_block_is_decoded(beside):
    sampler, codec, seen = stream(None)
    assert beside(sampler, codec, 3, "cpu") > 0
    assert len(seen) == 3
