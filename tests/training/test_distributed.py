"""Two processes equal one: every stage under torchrun over gloo, against the same stage alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from echo_infinity.ranks import Ranks, join_ranks
from echo_infinity.training.distributed import clip_gradients
from echo_infinity.weights import load_checkpoint, read_tensors, text_metadata
from every_stage import STAGES, run_stages
from numerics import assert_golden, assert_same_bits

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """Folders of the stages' runs on one process and on two."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, str(HERE / "every_stage.py"), str(folders), str(together)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as two:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("echo_infinity.training.loop.plot_lines", lambda *args, **rest: None)
                run_stages(folders, alone, Ranks())
            output, _ = two.communicate(timeout=240)
        finally:
            two.terminate()  # or leaving would wait for processes that wait for each other; one that ended ignores it
    assert two.returncode == 0, output[-4000:]
    return alone, together


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_are_those_of_one_process(runs, stage):
    alone, together = (run / stage / "checkpoint.safetensors" for run in runs)
    logs = [json.loads(text_metadata(path)["log"]) for path in (alone, together)]
    assert [row["step"] for row in logs[1]] == [1, 2]
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        names = [name for name in one if name != "seconds"]
        assert_golden(torch.tensor([two[n] for n in names]), torch.tensor([one[n] for n in names]))
    ours, theirs = read_tensors(alone), read_tensors(together)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        if "adam." in name and x.ndim:  # the moments: gradients of the last step and their squares
            assert_golden(theirs[name], x, "gradient")
        elif x.is_floating_point():
            assert_golden(theirs[name], x)
        else:
            assert_same_bits(theirs[name], x)


@pytest.mark.parametrize("stage", STAGES)
def test_models_exported_by_two_processes_are_whole(runs, stage):
    ours, theirs = (load_checkpoint(run / stage / "model") for run in runs)
    for a, b in zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True):
        assert_golden(b, a)


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join_ranks()
    assert (ranks.rank, ranks.world, ranks.mesh) == (0, 1, None)
    assert ranks.rows(5) == slice(0, 5)
    assert ranks.mean({"a": 2.0}) == {"a": 2.0}


def test_a_batch_that_can_not_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="a batch of 5 can't be shared out evenly among 2 processes"):
        Ranks(rank=1, world=2).rows(5)
    assert Ranks(rank=1, world=2).rows(6) == slice(3, 6)


def test_gradients_are_clipped_to_a_norm():
    x = torch.nn.Parameter(torch.zeros(3))
    x.grad = torch.tensor([3.0, 0.0, 4.0])
    assert clip_gradients([x], 10.0) == pytest.approx(5.0)
    assert clip_gradients([x], 1.0) == pytest.approx(5.0)
    assert_golden(x.grad, torch.tensor([0.6, 0.0, 0.8]))
