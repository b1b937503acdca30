"""The ablation table: rows differ in one factor, runs are kept, the command prints a table."""

from dataclasses import replace

import pytest
import torch
from echo_infinity import cli
from echo_infinity.codec import Codec
from echo_infinity.training.ablate import FACTORS, Ablation, Runner, name_rows, set_up
from echo_infinity.training.clips import Clips

pytestmark = pytest.mark.usefixtures("no_plots")
SETTINGS = Ablation(steps=1, batch=2, blocks=7, graded=3, scenes=0, held_out=3)


@pytest.fixture
def clips(prompts):
    marks = [torch.rand(8, 7) < 0.4 for _ in range(4)]
    latents = torch.randn(8, 21, 4, 4, 4).half()
    return Clips(latents, latents, *marks, prompts=[prompts[i % 3] for i in range(8)], clips=[{}] * 8)


def differences(a, b):
    return {name for name in vars(a) if getattr(a, name) != getattr(b, name)}


def test_a_row_without_a_factor_differs_in_that_alone(student):
    rows = name_rows(alone=True)
    assert len(rows) == 2 + 2 * len(FACTORS)
    assert rows["all"] == set(FACTORS)
    assert rows["none"] == set()
    config, training = set_up(student.config, SETTINGS, rows["all"], seed=0)
    changed = {}
    for name in FACTORS:
        assert rows["all"] - rows[f"without {name}"] == {name}
        other, others = set_up(student.config, SETTINGS, rows[f"without {name}"], seed=0)
        changed[name] = differences(config.memory, other.memory) | differences(training, others)
    assert changed == {
        **{"positions": {"positions"}, "gate_bias": {"gate_bias"}, "memory_rate": {"memory_rate"}},
        **{"weights": {"reappear_weight"}, "noise": {"reappear_noise"}},
        **{"curriculum": set(), "by_place": set()},  # other clips, another start
    }


def test_runs_are_kept_and_every_row_trains(student, folders, clips, tmp_path):
    near = replace(clips, latents=clips.latents + 1)
    runner = Runner(SETTINGS, student.config, str(folders / "student"), near, clips, student.codec, tmp_path)
    assert (len(runner.far), len(runner.tested)) == (5, 3)
    rows = name_rows(alone=False)
    results = {name: runner.run(name, rows[name], 0) for name in ("all", "without positions", "without curriculum")}
    assert len({r["reappear"] for r in results.values()}) == 3
    stamp = (tmp_path / "all-0" / "result.json").stat().st_mtime_ns
    assert runner.run("all", rows["all"], 0) == results["all"]
    assert (tmp_path / "all-0" / "result.json").stat().st_mtime_ns == stamp


def test_the_command_prints_a_table(student, folders, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("echo_infinity.training.ablate.load_clips", lambda folder: clips)
    monkeypatch.setattr("echo_infinity.training.ablate.preset", lambda name: student.config)
    words = ["train", "ablate", "--start", folders / "student", "--near", "a", "--far", "b", "--out", tmp_path]
    words += ["--codec", folders / "student" / "codec.safetensors", "--steps", 1, "--batch", 2, "--blocks", 7]
    words += ["--scenes", 0, "--held-out", 2, "--rows", "none", "without gate_bias"]
    assert cli.main([*map(str, words)]) == 0
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    assert lines[0].startswith("| run | reappear | first_open")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| none", "| without gate_bias"]


def test_wrong_requests_are_refused(student, clips, tmp_path, capsys):
    with pytest.raises(ValueError, match="8 far clips leave none to train on beside 8 held out"):
        Runner(replace(SETTINGS, held_out=8), student.config, "", clips, clips, Codec(student.codec.config), tmp_path)
    with pytest.raises(ValueError, match="has no memory to take apart"):
        set_up(replace(student.config, memory=None), SETTINGS, frozenset(), 0)
    assert cli.main(["train", "ablate", "--start", "x", "--near", "a", "--far", "b", "--rows", "best"]) == 2
    assert "no rows best; there are: all, without positions" in capsys.readouterr().err
