"""Two processes equal one: streams whose tokens and heads are shared out, under torchrun over gloo."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import every_way
import pytest
import torch
from echo_infinity.config import preset
from echo_infinity.parallel import Ranks
from echo_infinity.parallel.split import Split
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.state import ResumeWarning, read_state
from numerics import assert_golden, assert_same_bits
from running import frames_of, hashes_of
from safetensors.torch import load_file
from small import CIRCLE, SQUARE, save_small

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STREAMS = ["plain", "kept", "anew", "off", "fp8", "pooled"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Folders of what one process and two wrote."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    torchrun(str(Path(every_way.__file__)), model, together)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    every_way.run(model, alone, Ranks())
    torch.set_num_threads(threads)
    return alone, together


def torchrun(*words):
    """Run on two processes; return what they wrote to the terminal."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TWO, *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", STREAMS)
def test_latents_are_those_of_one_process(runs, name):
    alone, together = (load_file(run / f"{name}.safetensors")["latents"] for run in runs)
    assert len(alone) == 3 * every_way.BLOCKS
    assert_golden(together, alone)


def test_the_ways_differ(runs):
    found = [load_file(runs[0] / f"{name}.safetensors")["latents"][-3:] for name in STREAMS]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize("name", STREAMS)
def test_saved_states_are_whole(runs, name):
    alone, together = (read_state(run / f"{name}.state.safetensors") for run in runs)
    assert alone.tensors.keys() == together.tensors.keys()
    for key, x in alone.tensors.items():
        if key.endswith(".codes"):  # a rounding apart at most
            assert (together.tensors[key].int() - x.int()).abs().max() <= 1
        elif x.is_floating_point():
            assert_golden(together.tensors[key], x)
        else:
            assert_same_bits(together.tensors[key], x)
    alone.meta["environment"]["processes"] = 2
    assert together.meta == alone.meta


def test_streams_take_turns_and_go_on_from_a_file_or_a_fork_with_the_same_bits(runs):
    alone, together = (list(load_file(run / "interleaved.safetensors").values()) for run in runs)
    assert len(alone) == len(together) == 11
    for i in (5, 8):
        assert_same_bits(together[i + 1], together[i])
        assert_same_bits(together[i + 2], together[i])
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.int() - theirs.int()).abs().max() <= 1  # pixels round


def test_a_program_that_fails_lets_the_others_go(runs):
    assert (runs[1] / "failed").read_text() == "the program's own"


def test_a_stream_of_two_processes_goes_on_alone_with_a_warning(runs, model):
    pipe = EchoPipeline.from_pretrained(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.warns(ResumeWarning, match="processes was 2, is 1"):
        theirs = pipe.resume(runs[1] / "kept.state.safetensors")
    ours = pipe.resume(runs[0] / "kept.state.safetensors")
    torch.set_num_threads(threads)
    assert_golden(next(theirs), next(ours))


def test_command_writes_one_video_and_goes_on(model, tmp_path):
    video, hashes = tmp_path / "out.mp4", tmp_path / "hashes.txt"
    command = ["-m", "echo_infinity.cli", "generate", "--raw-hashes", hashes]
    output = torchrun(*command, CIRCLE, "--model", model, "--frames", "50", "-o", video, "--autosave", "0")
    assert output.count("50 frames") == 1
    state = tmp_path / "out.state.safetensors"
    torchrun(*command, SQUARE, "--resume", state, "--frames", "70")
    assert frames_of(video) == list(range(70))
    assert len(hashes_of(hashes)) == 7
    assert read_state(state).meta["prompts"][-1]["prompt"] == SQUARE


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by Linux's /proc")
def test_the_death_of_a_process_ends_the_run_and_names_the_last_state(model, tmp_path):
    words = ["generate", CIRCLE, "--model", str(model), "--endless", "-o", str(tmp_path / "out.mp4"), "--autosave", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    state = tmp_path / "out.state.safetensors"
    with subprocess.Popen(
        [*TWO, "-m", "echo_infinity.cli", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        try:
            deadline = time.monotonic() + 60
            while not (state.exists() and read_state(state).meta["blocks"]) and time.monotonic() < deadline:
                time.sleep(0.1)
            os.kill(worker(run.pid, rank=1), signal.SIGKILL)
            output, _ = run.communicate(timeout=60)
        finally:
            run.terminate()
    assert run.returncode == 1
    assert "error: one of 2 processes failed or ended" in output
    assert re.search(r"go on from it with:\n  echo-infinity generate --resume .*out\.state\.safetensors", output)
    assert read_state(state).meta["blocks"] >= 1


def worker(parent, rank):
    """The process of that rank among the children of torchrun."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ranks = {f"RANK={rank}".encode()}
    (found,) = [pid for pid in children if ranks & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))]
    return int(found)


def test_a_model_that_can_not_be_shared_out_is_refused():
    with pytest.raises(
        ValueError, match=r"2 heads and 16 tokens a frame can't be shared .* 3 processes: tiny runs on 1, 2"
    ):
        Split(preset("tiny"), Ranks(rank=0, world=3))
    with pytest.raises(ValueError, match=r"12 heads and 1560 tokens .* wan2.1-1.3b runs on 1, 2, 3, 4, 6, 12$"):
        Split(preset("wan2.1-1.3b"), Ranks(rank=0, world=5))


def test_own_tokens_are_a_run_of_every_frame():
    x = torch.arange(2 * 3 * 16).view(2, 48, 1)
    parts = [Split(preset("tiny"), Ranks(rank=rank, world=2)).own_tokens(x) for rank in range(2)]
    whole = torch.stack([part.view(2, 3, 8, 1) for part in parts], dim=2)
    assert_same_bits(whole.view(2, 48, 1), x)
