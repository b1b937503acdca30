"""kill -9 in mid-training, resume, same losses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from echo_infinity.training.distill import Distillation, DistillTrainer
from echo_infinity.weights import load_checkpoint, text_metadata

OPTIONS = {"steps": 1000, "ratio": 2, "batch": 2, "rate": 1e-3}


def steps_in(path):
    try:
        return int(text_metadata(path)["step"])
    except ValueError:  # not there yet
        return 0


@pytest.mark.usefixtures("no_plots")
def test_a_killed_run_goes_on_with_the_losses_of_an_unbroken_one(folders, prompts, tmp_path):
    words = ["train", "distill", "--student", folders / "student", "--teacher", folders / "teacher", "--no-bf16"]
    words += ["--prompts", folders / "prompts.txt", "--out", tmp_path / "killed", "--save-every", 1]
    words += [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    code = "import sys; from echo_infinity.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, words)]
    checkpoint, deadline = tmp_path / "killed" / "checkpoint.safetensors", time.monotonic() + 120
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same bits need the same number
    with subprocess.Popen(command, env={**os.environ, **threads}, stderr=subprocess.DEVNULL) as run:
        while steps_in(checkpoint) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    done = steps_in(checkpoint)
    assert done >= 3

    student, teacher = load_checkpoint(folders / "student"), load_checkpoint(folders / "teacher")
    settings = Distillation(**OPTIONS, bf16=False)
    again = DistillTrainer(settings, student, teacher, teacher, prompts, tmp_path / "killed")
    assert again.resume()
    again.train(until=done + 2)
    whole = DistillTrainer(settings, student, teacher, teacher, prompts, tmp_path / "whole")
    whole.train(until=done + 2)
    for name in ("fake", "dmd"):
        assert [row.get(name) for row in again.log] == [row.get(name) for row in whole.log]
    assert len(json.loads(text_metadata(checkpoint)["log"])) == done + 2
