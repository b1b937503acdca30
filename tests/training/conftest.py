"""Small models for the stages: a causal student with memory and a bidirectional teacher of 21 frames."""

import pytest
import torch
from echo_infinity.model import CausalDiT
from echo_infinity.training.denoiser import whole_clip
from echo_infinity.weights import load_checkpoint, save_checkpoint
from small import save_small

PROMPTS = [
    "a red circle drifts over a dark field",
    "a blue square drifts over a dark field",
    "a green cross drifts over a dark field",
]


@pytest.fixture
def no_plots(monkeypatch):
    """Leave curves undrawn: a figure costs more than a step of these models."""
    monkeypatch.setattr("echo_infinity.training.loop.plot_lines", lambda *args, **rest: None)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Model folders of student and teacher, and a file of prompts."""
    root = tmp_path_factory.mktemp("stages")
    student = load_checkpoint(save_small(root / "student"))
    config = whole_clip(student.config, 21)
    torch.manual_seed(1)
    save_checkpoint(root / "teacher", config, CausalDiT(config.model), None, student.text, student.codec)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


@pytest.fixture(scope="session")
def student(folders):
    return load_checkpoint(folders / "student")


@pytest.fixture(scope="session")
def teacher(folders):
    return load_checkpoint(folders / "teacher")


@pytest.fixture(scope="session")
def prompts():
    return PROMPTS
