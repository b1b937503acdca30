"""The model that ships with the package: small files, the preset's geometry, a memory that recalls, and its prompt."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from echo_infinity.config import preset
from echo_infinity.evaluation.journal import Journal
from echo_infinity.evaluation.prompt import judge_frame
from echo_infinity.evaluation.recall import Recall, RecallTest, cells
from echo_infinity.evaluation.sampling import Rollout
from echo_infinity.weights import load_checkpoint

FOLDER = Path(str(files("echo_infinity"))) / "weights" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint("tiny")


def test_has_the_presets_geometry_and_small_files(tiny):
    assert tiny.config == preset("tiny")
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "codec.safetensors", "README.md"} <= names
    assert all(path.stat().st_size <= 10_000_000 for path in FOLDER.iterdir())


def test_recalls_colours_after_an_absence_of_the_window(tiny, tmp_path):
    test = RecallTest(rollouts=24, absences=(1,), modes=("shown", "swapped"), batch=24)
    shares = {}
    for policy, modes in (("evolving", test.modes), ("sink", ("shown",))):
        judge, journal = Recall(tiny, policy, replace(test, modes=modes)), Journal(tmp_path / f"{policy}.jsonl", {})
        judge.run(journal, lambda steps: None)
        shares |= {(policy, cell.mode): cell.colour.share for cell in cells(journal.rows)}
    assert shares["evolving", "shown"] >= 0.8
    assert max(shares["evolving", "swapped"], shares["sink", "shown"]) <= 0.35
    assert shares["evolving", "truth"] == 1
    assert shares["evolving", "codec"] >= 0.9
    assert shares["evolving", "chance"] <= 0.35


def test_shows_the_red_of_the_readmes_prompt(tiny):
    prompt, seeds = "a red circle drifts over a dark field", range(6)
    rollout = Rollout(tiny, None, [prompt] * len(seeds), seeds)
    frames = [frame for _ in range(14) for frame in rollout.next_block()[1][:, -1]]  # ten seconds of each
    assert sum(judge_frame(prompt, frame).colours for frame in frames) >= 0.75 * len(frames)
    other = prompt.replace("red", "blue")
    assert sum(judge_frame(other, frame).colours for frame in frames) <= 0.25 * len(frames)
