"""``echo-infinity eval``: one command, one table, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from echo_infinity import cli
from echo_infinity.evaluation import plots
from echo_infinity.evaluation.pictures import read_png

RECALL = ["--rollouts", "2", "--batch", "2", "--absences", "1", "--quiet"]
OTHERS = ["--hours", "0.02", "--streams", "2", "--clips", "2", "--seconds", "8.6", "--blocks", "4"]
PROMPT = "a red circle drifts over a dark field"


@pytest.fixture
def evaluate(untrained_folder, tmp_path, capsys):
    """Run ``echo-infinity eval`` with these words: (exit code, stdout, stderr)."""

    (tmp_path / "prompts.txt").write_text(PROMPT)

    def run(*words):
        capsys.readouterr()
        words = [*words, "--model", str(untrained_folder), "--out", str(tmp_path / "eval")]
        return cli.main(["eval", *words]), *capsys.readouterr()

    return run


def test_all_measures_of_two_policies_are_in_one_report(evaluate, tmp_path):
    code, out, err = evaluate(
        "--policy", "evolving", "sink", "--prompts", str(tmp_path / "prompts.txt"), *RECALL, *OTHERS
    )
    assert code == 0, err
    folder = tmp_path / "eval"
    assert (folder / "report.md").read_text() == out
    for title in (
        "Recall",
        "Drift",
        "Streams that went wrong",
        "Prompt",
        "After a prompt switch",
        "Cost of one stream",
    ):
        table = out.split(f"## {title}\n")[1].split("##")[0]
        assert "untrained-evolving" in table
        assert "untrained-sink" in table
    figures = json.loads((folder / "report.json").read_text())
    assert set(figures) == {"untrained-evolving", "untrained-sink"}
    assert set(figures["untrained-sink"]) == {"settings", "recall", "drift", "prompt", "switch", "cost"}
    assert figures["untrained-sink"]["settings"]["recall"]["policy"] == "sink"
    for name in ("recall.png", "drift.png", "prompt.png", "untrained-sink/contact_sheet.png"):
        assert read_png(folder / name).shape[0] == 3
    before = out
    code, out, _ = evaluate("report")
    assert (code, out) == (0, before)


def test_a_second_run_measures_nothing_and_other_settings_are_refused(evaluate, tmp_path):
    assert evaluate("recall", *RECALL)[0] == 0
    journal = tmp_path / "eval" / "untrained-evolving" / "recall.jsonl"
    lines = journal.read_text()
    assert evaluate("recall", *RECALL)[0] == 0
    assert journal.read_text() == lines
    code, _, err = evaluate("recall", *RECALL, "--seed", "5")
    assert code == 2
    assert "measured with other settings: seed (then 0, now 5)" in err
    assert evaluate("recall", *RECALL, "--seed", "5", "--restart")[0] == 0
    assert journal.read_text() != lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed"], "measures are recall, drift, prompt, cost, vbench, report, got speed"),
        (["recall", "--policy", "hope"], "unknown policy 'hope'; known: window, sink"),
        (["recall", "--policy", "sink", "window", "--name", "a"], "--name names one run"),
        (["drift", "--policy", "full", "--hours", "1", *RECALL], "policy full can hold 240: ask for shorter"),
        (["drift", "--prompts", "nowhere.txt"], "No such file"),
        (["vbench"], "not installed: pip install"),
        (["report"], "holds no measured run"),
    ],
)
def test_requests_that_can_not_be_served_are_refused(evaluate, words, message):
    code, _, err = evaluate(*words)
    assert code == 2
    assert message in err


def test_mode_swapped_is_left_out_where_there_is_no_memory(evaluate):
    code, out, err = evaluate("recall", "--policy", "evolving", "sink", "--modes", "shown", "swapped", *RECALL)
    assert code == 0
    assert "policy sink keeps no memory to swap: mode swapped left out" in err
    swapped = [line for line in out.splitlines() if "another rollout's memory" in line]
    assert [line.split("|")[1].strip() for line in swapped] == ["untrained-evolving"]


def test_without_matplotlib_there_are_tables_and_a_word_about_plots(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    code, out, err = evaluate("recall", *RECALL)
    assert code == 0
    assert "## Recall" in out
    assert plots.NEEDS in err
    assert not (tmp_path / "eval" / "recall.png").exists()


def test_killed_and_run_again_gives_the_same_report(untrained_folder, tmp_path):
    """SIGKILL in the middle of recall and of drift; then the same command to the end."""
    (tmp_path / "prompts.txt").write_text(PROMPT)

    def command(out):
        words = ["recall", "drift", *RECALL, *OTHERS, "--prompts", str(tmp_path / "prompts.txt"), "--threads", "1"]
        words += ["--model", str(untrained_folder), "--out", str(tmp_path / out), "--hours", "0.07"]
        return [sys.executable, "-m", "echo_infinity.cli", "eval", *words]

    def lines(out, measure):
        return sum(path.read_bytes().count(b"\n") for path in (tmp_path / out).glob(f"*/{measure}.jsonl"))

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    subprocess.run(command("whole"), check=True, **quiet)
    killed = 0
    for measure, count in (("recall", 4), ("drift", 4)):
        process = subprocess.Popen(command("killed"), **quiet)
        while process.poll() is None and lines("killed", measure) < count:
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += lines("killed", measure) < lines("whole", measure)
        process.communicate()
    assert killed == 2
    subprocess.run(command("killed"), check=True, **quiet)
    assert (tmp_path / "killed" / "report.md").read_text() == (tmp_path / "whole" / "report.md").read_text()
