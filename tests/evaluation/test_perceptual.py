"""Clips for VBench and LPIPS: cut where they should be, handed over, and refused where the packages are missing."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import av
import pytest
import torch
from echo_infinity.evaluation import perceptual
from echo_infinity.evaluation.journal import Journal
from echo_infinity.evaluation.perceptual import DIMENSIONS, LPIPS, Perceptual, PerceptualTest, trends, why_not

TEST = PerceptualTest(("a red circle drifts over a dark field",), minutes=1)


def module(name, **attributes):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__file__ = f"/nowhere/{name}/__init__.py"
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules with the two packages' calls: VBench writes a result file, LPIPS compares pairs of pictures."""
    asked = []

    class VBench:
        def __init__(self, device, full_info, output):
            self.output = Path(output)
            self.output.mkdir(parents=True, exist_ok=True)

        def evaluate(self, *, videos_path, name, dimension_list, mode):
            asked.append((sorted(path.name for path in Path(videos_path).iterdir()), mode))
            results = {dimension: [0.5 + len(asked) / 10, []] for dimension in dimension_list}
            (self.output / f"{name}_eval_results.json").write_text(json.dumps(results))

    class Lpips(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.min() >= -1
            assert a.max() <= 1
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setitem(sys.modules, "vbench", module("vbench", VBench=VBench))
    monkeypatch.setitem(sys.modules, "lpips", module("lpips", LPIPS=Lpips))
    return asked


def test_says_which_packages_are_missing(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None if name == "vbench" else object())
    assert why_not().startswith("vbench not installed: pip install vbench")
    with pytest.raises(ValueError, match="vbench not installed"):
        Perceptual(untrained, "evolving", TEST, tmp_path)


def test_clips_start_every_half_minute_and_each_start_is_a_row(untrained, tmp_path, stand_ins):
    judge, done = Perceptual(untrained, "evolving", TEST, tmp_path / "clips"), []
    journal = Journal(tmp_path / "vbench.jsonl", TEST.settings())
    judge.run(journal, done.append)
    assert sum(done) == judge.steps() == 4
    assert [row["start"] for row in journal.rows] == [0, 30]
    assert stand_ins == [(["000.mp4"], "custom_input")] * 2
    for start in ("000000", "000030"):
        with av.open(str(tmp_path / "clips" / start / "000.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 5 * 16
    found = trends(journal.rows)
    assert set(found) == {*DIMENSIONS, LPIPS}
    assert found["imaging_quality"][2].value == pytest.approx(0.1 * 120)  # 0.1 in half a minute
    judge.run(journal, done.append)
    assert len(stand_ins) == 2  # a second run measures nothing again


def test_weights_that_can_not_be_loaded_are_said_so(untrained, tmp_path, stand_ins, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(sys.modules["lpips"], "LPIPS", fail)
    judge = Perceptual(untrained, "evolving", TEST, tmp_path / "clips")
    with pytest.raises(ValueError, match="could not load what they need: no route to host"):
        judge.run(Journal(tmp_path / "vbench.jsonl", {}), lambda steps: None)


def test_no_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        PerceptualTest(())
