"""Streams on Ray's actors: bits do not depend on where a stream is, has been, or what died on the way."""

import os
import signal
from pathlib import Path

import pytest
import torch
from echo_infinity.extras import MissingExtraError
from echo_infinity.fleet import AdvanceError, Fleet
from echo_infinity.host import LostStreamError, StreamHost
from echo_infinity.noise import counter_noise
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.state import read_state
from numerics import assert_same_bits
from small import CIRCLE, SQUARE, save_small


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def fleet(model, tmp_path_factory):
    """Two hosts on a Ray of this module's own, which talks to nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            with Fleet(model, folder=tmp_path_factory.mktemp("saved"), hosts=2, cpus=1) as fleet:
                yield fleet
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def alone(model):
    """Blocks of a stream on one process, on one thread as the hosts: (prompt, seed, switches by block) -> blocks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipe = EchoPipeline.from_pretrained(model)

    def blocks(count, prompt, switches=(), **options):
        stream, made = pipe.stream(prompt, **options), []
        for block in range(count):
            if block in switches:
                stream.switch(switches[block])
            made.append(next(stream))
        return made

    yield blocks
    torch.set_num_threads(threads)


def kill(fleet, name):
    """End the process of the stream's host as a power cut would; return the host."""
    host = fleet.streams[name]
    os.kill(fleet._ray.get(fleet._hosts[host].process.remote()), signal.SIGKILL)
    return host


def test_streams_are_those_of_one_process_wherever_they_move(fleet, alone):
    expected = {"a": alone(7, CIRCLE, {5: SQUARE}, seed=1), "b": alone(7, SQUARE, seed=2)}
    fleet.start("a", CIRCLE, seed=1)
    fleet.start("b", SQUARE, seed=2)
    assert set(fleet.streams.values()) == {0, 1}
    made = fleet.advance(blocks=5)
    fleet.switch("a", SQUARE)  # waits in the saved stream while it moves
    fleet.move("a", fleet.streams["b"])
    assert fleet.streams["a"] == fleet.streams["b"]
    again = fleet.advance(blocks=2)
    for name, blocks in expected.items():
        assert_same_bits(torch.cat([made[name], again[name]]), torch.cat(blocks))
        fleet.stop(name)
    assert fleet.streams == {}


def test_a_stream_survives_the_death_of_its_host(fleet, alone):
    expected = alone(9, CIRCLE, {3: SQUARE, 6: CIRCLE}, seed=3)
    made = []
    fleet.start("a", CIRCLE, seed=3)
    made += [fleet.advance()["a"] for _ in range(2)]
    first = kill(fleet, "a")  # never saved: it starts over
    made.append(fleet.advance()["a"])
    assert fleet.streams["a"] != first
    fleet.switch("a", SQUARE)
    fleet.save("a")  # with the switch waiting
    assert read_state(fleet.folder / "a.state.safetensors").meta["blocks"] == 3
    made += [fleet.advance()["a"] for _ in range(3)]
    fleet.switch("a", CIRCLE)  # after the save: made again
    kill(fleet, "a")
    made += [fleet.advance()["a"] for _ in range(3)]
    for block, (ours, theirs) in enumerate(zip(made, expected, strict=True)):
        assert_same_bits(ours, theirs, f"block {block}")
    fleet.stop("a")


def test_one_failure_leaves_the_others_what_they_made(fleet, alone):
    fleet.start("good", CIRCLE, seed=4)
    fleet.start("bad", CIRCLE, noise=lambda block, step, shape: torch.full(shape, torch.nan))
    with pytest.raises(AdvanceError, match=r"bad: .*NaN or Inf") as caught:
        fleet.advance()
    assert list(caught.value.failures) == ["bad"]
    assert_same_bits(caught.value.outputs["good"], alone(1, CIRCLE, seed=4)[0])
    for name in ("good", "bad"):
        fleet.stop(name)


def test_a_stream_that_can_not_be_saved_takes_nothing_from_the_others(fleet, alone, monkeypatch):
    monkeypatch.setattr(fleet, "save_every", 1)
    expected = alone(1, CIRCLE, seed=4)[0]
    fleet.start("ends", CIRCLE, seed=4, callback=lambda stream, *_: stream.close())
    fleet.start("goes on", CIRCLE, seed=4)
    with pytest.raises(AdvanceError, match="ends: the stream is closed") as caught:
        fleet.advance()
    assert list(caught.value.failures) == ["ends"]
    assert_same_bits(caught.value.outputs, {"ends": expected, "goes on": expected})
    assert read_state(fleet.folder / "goes on.state.safetensors").meta["blocks"] == 1
    for name in ("ends", "goes on"):
        fleet.stop(name)


def test_blocks_before_a_failed_one_are_not_lost(fleet, alone, tmp_path):
    fleet.start("a", CIRCLE, noise=failing_once(tmp_path / "failed", at=2))
    made = [fleet.advance()["a"]]
    with pytest.raises(AdvanceError, match="a: a glitch"):
        fleet.advance(blocks=2)  # the second of them
    made.append(fleet.advance(blocks=2)["a"])
    assert_same_bits(torch.cat(made), torch.cat(alone(3, CIRCLE)))
    fleet.stop("a")


def failing_once(mark, at):
    """The noise of seed 0, which raises when it is first asked for block ``at``; ``mark`` is the file that tells."""
    path, plain = str(mark), counter_noise(0)

    def noise(block, step, shape):
        if block == at and not Path(path).exists():
            Path(path).touch()
            raise ValueError("a glitch")
        return plain(block, step, shape)

    return noise


def test_an_unknown_name_is_refused_before_any_stream_has_gone_on(fleet, alone):
    fleet.start("a", CIRCLE, seed=5)
    with pytest.raises(ValueError, match="no stream 'b'; there are: a"):
        fleet.advance(["a", "b"])
    assert_same_bits(fleet.advance()["a"], alone(1, CIRCLE, seed=5)[0])
    fleet.stop("a")


def test_requests_that_make_no_sense_are_refused(fleet):
    fleet.start("a", CIRCLE)
    for name in ("a", "", "folder/a"):
        with pytest.raises(ValueError, match="a name that is free and can name a file"):
            fleet.start(name, CIRCLE)
    with pytest.raises(ValueError, match="no host 2: there are 2"):
        fleet.move("a", 2)
    with pytest.raises(ValueError, match="no stream 'b'; there are: a"):
        fleet.advance(["b"])
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        fleet.advance(blocks=0)
    with pytest.raises(ValueError, match="prompt"):
        fleet.start("b", "")
    assert list(fleet.streams) == ["a"]
    fleet.stop("a")
    with pytest.raises(ValueError, match="need hosts >= 1"):
        Fleet("tiny", folder=fleet.folder, hosts=0)


def test_a_host_says_that_it_lost_a_stream(model):
    threads = torch.get_num_threads()
    host = StreamHost(str(model), threads, {})
    with pytest.raises(LostStreamError, match="no stream 'a' on this host"):
        host.advance("a", 1)


@pytest.mark.parametrize(("at", "kept"), [(0, True), (1, False)], ids=["first", "second"])
def test_a_host_keeps_a_stream_that_failed_only_where_it_was(model, tmp_path, at, kept):
    host = StreamHost(str(model), torch.get_num_threads(), {})
    host.start("a", CIRCLE, {"noise": failing_once(tmp_path / "failed", at)})
    with pytest.raises(ValueError, match="a glitch"):
        host.advance("a", 2)
    assert host.ready() == kept
    if kept:
        whole = StreamHost(str(model), torch.get_num_threads(), {})
        whole.start("a", CIRCLE, {})
        assert_same_bits(host.advance("a", 2), whole.advance("a", 2))


def test_without_ray_the_message_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"a fleet of streams needs ray.*'echo-infinity\[ray\]'"):
        Fleet("tiny", folder=tmp_path)
