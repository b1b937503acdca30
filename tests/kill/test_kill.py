"""A process killed at any instant loses at most the blocks since its last save."""

import importlib.util
import sys
from pathlib import Path

import pytest
from small import save_small


@pytest.fixture(scope="module")
def bench():
    """The stand-alone script ``bench/kill.py``, which does twenty kills."""
    path = Path(__file__).parents[2] / "bench" / "kill.py"
    spec = importlib.util.spec_from_file_location("bench_kill", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_killed_three_times_the_stream_gives_the_frames_of_an_unbroken_run(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = save_small(tmp_path / "model")
    outcome = bench.break_and_resume(str(model), tmp_path, kills=3, frames=400, seed=1)
    assert outcome.kills == 3
    assert outcome.resumed_at == sorted(outcome.resumed_at)
    assert outcome.resumed_at[-1] > 0
    assert outcome.same_frames
    assert outcome.times == list(range(400))
