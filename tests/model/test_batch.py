"""Several streams in one batch: each is what it would be alone."""

import itertools
import os
import shlex
import signal
import threading

import av
import pytest
import torch
from echo_infinity import cli
from echo_infinity.finite import NonFiniteError
from echo_infinity.noise import counter_noise
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.prompts import TimedPrompt
from echo_infinity.record import Recorder
from echo_infinity.state import read_state
from echo_infinity.stream import Stream
from numerics import assert_same_bits
from running import frames_of
from small import CIRCLE, SQUARE, save_small, small_pipe

CROSS = "a green cross drifts over a dark field"
ALIKE = {"rtol": 0, "atol": 2e-5}  # a matrix product of more rows may add in another order


def take(stream, blocks):
    return list(itertools.islice(stream, blocks))


def columns(batch, blocks):
    """Blocks of each stream, joined."""
    return [torch.cat(x) for x in zip(*take(batch, blocks), strict=True)]


def test_streams_of_a_batch_are_those_of_streams_alone():
    pipe, pairs = small_pipe(), [(CIRCLE, 1), (SQUARE, 2), (CIRCLE, 3)]
    batch = pipe.batch(*zip(*pairs, strict=True), output_type="latents")
    for ours, (prompt, seed) in zip(columns(batch, 8), pairs, strict=True):
        alone = torch.cat(take(pipe.stream(prompt, seed=seed, output_type="latents"), 8))
        torch.testing.assert_close(ours, alone, **ALIKE)


@pytest.mark.parametrize("settings", [{"memory": "off"}, {"memory": "frozen"}, {"memory_dtype": torch.float64}])
def test_a_batch_keeps_each_kind_of_memory(settings):
    pipe = small_pipe()
    batch = pipe.batch([CIRCLE] * 2, [1, 2], output_type="latents", **settings)
    for ours, seed in zip(columns(batch, 7), (1, 2), strict=True):
        alone = torch.cat(take(pipe.stream(CIRCLE, seed=seed, output_type="latents", **settings), 7))
        torch.testing.assert_close(ours, alone, **ALIKE)


def test_pixels_have_the_length_of_a_streams():
    assert [[tuple(x.shape) for x in row] for row in take(small_pipe().batch([CIRCLE] * 2, [1, 2]), 2)] == [
        [(9, 32, 32, 3)] * 2,
        [(12, 32, 32, 3)] * 2,
    ]


@pytest.mark.parametrize("blocks", [0, 1, 3, 7])
@pytest.mark.parametrize("recache", [False, True])
def test_a_switch_in_one_stream_is_that_of_a_stream_alone_and_leaves_the_others(blocks, recache):
    pipe = small_pipe()
    batch, untouched = (pipe.batch([CIRCLE] * 2, [1, 2], output_type="latents") for _ in range(2))
    alone = pipe.stream(CIRCLE, seed=1, output_type="latents")
    take(batch, blocks), take(untouched, blocks), take(alone, blocks)
    for stream in (batch.streams[0], alone):
        stream.switch(SQUARE, memory_recache=recache, global_sink=not recache)
    first, second = columns(batch, 6)
    torch.testing.assert_close(first, torch.cat(take(alone, 6)), **ALIKE)
    assert_same_bits(second, columns(untouched, 6)[1])


def test_a_saved_stream_of_a_batch_goes_on_alone_or_in_a_batch(tmp_path):
    pipe = small_pipe()
    batch = pipe.batch([CIRCLE, SQUARE], [1, 2], schedule=[TimedPrompt(4, CROSS)])
    take(batch, 5)
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for stream, path in zip(batch.streams, paths, strict=True):
        stream.save(path)
    rest = take(batch, 4)
    assert_same_bits(take(pipe.resume_batch(paths), 4), rest)
    for i, path in enumerate(paths):  # pixels: a last bit may tip a rounding
        alone = torch.cat(take(pipe.resume(path), 4)).int()
        assert (alone - torch.cat([x[i] for x in rest]).int()).abs().max() <= 1


def test_a_fork_of_a_batchs_stream_is_free_of_it():
    batch = small_pipe().batch([CIRCLE] * 2, [1, 2], output_type="latents")
    take(batch, 5)
    twin = batch.streams[1].fork()
    ahead = torch.cat(take(twin, 3))
    torch.testing.assert_close(ahead, columns(batch, 3)[1], **ALIKE)


def test_a_schedule_cuts_all_streams_together():
    pipe, noise = small_pipe(), counter_noise(2)
    batch = pipe.batch([CIRCLE] * 2, [1, 2], schedule=[TimedPrompt(1, SQUARE, cut=True)], output_type="latents")
    after = columns(batch, 8)[1][6:]
    alone = pipe.stream(SQUARE, noise=lambda b, s, shape: noise(b + 2, s, shape), output_type="latents")
    torch.testing.assert_close(after, torch.cat(take(alone, 6)), **ALIKE)
    assert [stream.frames for stream in batch.streams] == [12 * 8 - 6] * 2


def test_a_cut_of_some_streams_is_refused_and_nothing_is_lost():
    pipe = small_pipe()
    batch, untouched = (pipe.batch([CIRCLE] * 2, [1, 2]) for _ in range(2))
    take(batch, 2), take(untouched, 2)
    batch.streams[1].switch(SQUARE, cut=True)
    with pytest.raises(ValueError, match=r"streams \[1\] of a batch of 2 are to be cut"):
        next(batch)
    batch.streams[1].switch(CIRCLE)
    untouched.streams[1].switch(CIRCLE)
    assert_same_bits(take(batch, 3), take(untouched, 3))


def test_a_stream_of_a_batch_does_not_advance_alone():
    batch = small_pipe().batch([CIRCLE] * 2, [1, 2])
    with pytest.raises(ValueError, match="advances with its batch"):
        next(batch.streams[0])


def test_streams_at_different_blocks_are_not_resumed_in_a_batch(tmp_path):
    pipe = small_pipe()
    for i in range(2):
        stream = pipe.stream(CIRCLE, seed=i)
        take(stream, 2 + i)
        stream.save(tmp_path / f"{i}")
    with pytest.raises(ValueError, match=r"different blocks, frames \[6, 9\] of shots that began with blocks \[0\]"):
        pipe.resume_batch([tmp_path / "0", tmp_path / "1"])


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [([], [], "0 prompts, 0 seeds"), ([CIRCLE], [1, 2], "1 prompts, 2 seeds"), ([CIRCLE, ""], [1, 2], "empty")],
)
def test_a_batch_that_makes_no_sense_is_refused(prompts, seeds, message):
    with pytest.raises(ValueError, match=message):
        small_pipe().batch(prompts, seeds)


def test_nan_in_one_stream_stops_all_of_them():
    batch = small_pipe().batch([CIRCLE] * 2, [1, 2])
    take(batch, 1)
    good = batch._sampler.noises[1]
    batch._sampler.noises[1] = lambda b, s, shape: good(b, s, shape) * float("nan")
    with pytest.raises(NonFiniteError):
        take(batch, 2)


@pytest.mark.parametrize("policy", ["ema", "pooled", "rolling"])
def test_a_batch_keeps_a_policys_tier(tmp_path, policy):
    from echo_infinity.policies import find_policy
    from echo_infinity.weights import load_checkpoint

    loaded = load_checkpoint(save_small(tmp_path / "m"))
    config = find_policy(policy).configure(loaded.config)
    pipe = EchoPipeline(loaded._replace(config=config, memory=None))
    batch = pipe.batch([CIRCLE] * 2, [1, 2], output_type="latents")
    take(batch, 6)
    for i, stream in enumerate(batch.streams):
        stream.save(tmp_path / f"{i}")
    rest = columns(batch, 4)
    again = columns(pipe.resume_batch([tmp_path / "0", tmp_path / "1"]), 4)
    assert_same_bits(again, rest)
    alone = torch.cat(take(pipe.stream(CIRCLE, seed=2, output_type="latents"), 10))[18:]
    torch.testing.assert_close(rest[1], alone, **ALIKE)


def test_generate_writes_a_video_for_each_seed_and_prompt(echo, folder):
    code, out, err = echo(CIRCLE, SQUARE, "--seed", "3,4", "--frames", 20, "-o", "out.mp4", "--raw-hashes", "h.txt")
    assert (code, err) == (0, "")
    assert sorted(x for x in os.listdir(folder) if x != "home") == ["h-0.txt", "h-1.txt", "out-0.mp4", "out-1.mp4"]
    for i, (prompt, seed) in enumerate([(CIRCLE, "3"), (SQUARE, "4")]):
        assert f"out-{i}.mp4: 20 frames" in out
        assert frames_of(f"out-{i}.mp4") == list(range(20))
        with av.open(f"out-{i}.mp4") as video:
            assert (video.metadata["prompt"], video.metadata["seed"]) == (prompt, seed)


def test_a_stopped_batch_is_saved_and_its_command_goes_on(echo, folder):
    timer = threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    code, _, err = echo(CIRCLE, "--seed", "1,2", "--endless", "-o", "out.mp4")
    timer.join()
    assert code == 130
    (line,) = [line for line in err.splitlines() if line.startswith("  echo-infinity generate --resume ")]
    have = len(frames_of("out-1.mp4"))
    assert cli.main([*shlex.split(line)[1:], "--frames", str(have + 30)]) == 0
    for i in range(2):
        assert frames_of(f"out-{i}.mp4") == list(range(have + 30))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([CIRCLE, SQUARE, "--seed", "1,2,3"], "2 prompts and 3 seeds"),
        ([CIRCLE, "--seed", "1,x"], "invalid int value"),
    ],
)
def test_a_bad_number_of_prompts_and_seeds_is_refused(echo, words, message, capsys):
    try:
        code, _, err = echo(*words, "--frames", 9, "-o", "out.mp4")
    except SystemExit as stop:
        code, err = stop.code, capsys.readouterr().err
    assert (code, message in err) == (2, True), err


def test_nan_in_one_stream_leaves_none_to_be_saved(tmp_path):
    batch = small_pipe().batch([CIRCLE] * 2, [1, 2])
    take(batch, 5)
    good = batch._sampler.noises[1]
    batch._sampler.noises[1] = lambda b, s, shape: good(b, s, shape) * float("nan")
    with pytest.raises(NonFiniteError):
        next(batch)
    batch._sampler.noises[1] = good
    for attempt in (lambda: next(batch), *(lambda x=x: x.save(tmp_path / "s") for x in batch.streams)):
        with pytest.raises(NonFiniteError):
            attempt()
    assert not (tmp_path / "s").exists()


def test_a_cut_of_a_stream_that_is_asked_to_advance_alone_is_refused_and_nothing_is_lost():
    batch, untouched = (small_pipe().batch([CIRCLE] * 2, [1, 2]) for _ in range(2))
    take(batch, 2), take(untouched, 2)
    for stream in (*batch.streams, *untouched.streams):
        stream.switch(SQUARE, cut=True)
    with pytest.raises(ValueError, match="advances with its batch"):
        next(batch.streams[0])
    assert_same_bits(take(batch, 3), take(untouched, 3))
    assert batch.streams[0].frames == untouched.streams[0].frames == 12 * 5 - 6


def test_a_memory_that_cant_start_over_among_the_others_is_refused_and_nothing_is_lost():
    pipe = small_pipe(write_every=2)
    batch, untouched = (pipe.batch([CIRCLE] * 2, [1, 2], output_type="latents") for _ in range(2))
    while not any("pending" in name for name in batch._sampler.tensors(0)) or batch.streams[0].block < 7:
        take(batch, 1), take(untouched, 1)
    batch.streams[0].switch(SQUARE, memory_recache=True)
    with pytest.raises(ValueError, match="one stream's memory can't start over here"):
        next(batch)
    for stream in (batch.streams[0], untouched.streams[0]):
        stream.switch(SQUARE)
    assert_same_bits(take(batch, 4), take(untouched, 4))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_row_that_could_not_be_decoded_is_decoded_at_the_next_call(monkeypatch, error):
    pipe = small_pipe()
    expected = take(pipe.batch([CIRCLE] * 2, [1, 2]), 4)
    batch, count, plain = pipe.batch([CIRCLE] * 2, [1, 2]), itertools.count(), pipe.codec.decode

    def decode(*args):
        if next(count) == 3:
            raise error
        return plain(*args)

    monkeypatch.setattr(pipe.codec, "decode", decode)
    made = take(batch, 1)
    with pytest.raises(error):
        next(batch)
    assert_same_bits(made + take(batch, 3), expected)


def test_callbacks_are_called_once_all_streams_have_their_block(tmp_path):
    told, pipe = [], small_pipe()

    def callback(stream, block, output):
        told.append((batch.streams.index(stream), block, [len(other.waiting) for other in batch.streams]))
        if told[-1][:2] == (0, 1):
            raise OSError("the callback's own")

    batch = pipe.batch([CIRCLE] * 2, [1, 2], callback=callback)
    take(batch, 1)
    with pytest.raises(OSError, match="own"):
        next(batch)
    take(batch, 1)
    assert told == [(0, 0, [0, 0]), (1, 0, [0, 0]), (0, 1, [0, 0]), (0, 2, [0, 0]), (1, 2, [0, 0])]


def batch_states(echo, frames=20):
    """States of two streams that were run together into b-0.mp4 and b-1.mp4."""
    assert echo(CIRCLE, "--seed", "1,2", "--frames", frames, "-o", "b.mp4", "--save", "b.st")[0] == 0
    return ["b-0.st", "b-1.st"]


def resume(states):
    return [word for state in states for word in ("--resume", state)]


def test_one_stream_is_not_resumed_twice_into_one_video(echo, folder):
    states = batch_states(echo)
    before = (folder / "b-0.mp4").read_bytes()
    code, _, err = echo(*resume([states[0], states[0]]), "--frames", 40)
    assert (code, "two streams of a batch can't share" in err) == (2, True)
    (folder / "copy.st").write_bytes((folder / "b-0.st").read_bytes())
    code, _, err = echo(*resume([states[0], "copy.st"]), "--frames", 40)
    assert (code, "b-0.mp4: resume each once" in err) == (2, True)
    assert (folder / "b-0.mp4").read_bytes() == before


def test_a_refused_batch_leaves_no_file_and_touches_none(echo, folder):
    (folder / "out-1.mp4").write_bytes(b"a film of mine")
    words = [CIRCLE, "--seed", "1,2", "--frames", 9, "-o"]
    code, _, err = echo(*words, "out.mp4")
    assert (code, "it exists already" in err) == (2, True)
    (folder / "pictures-1").write_bytes(b"a file")
    assert echo(*words, "pictures")[0] == 2
    (folder / "out-0.state.safetensors").write_bytes(b"a stream")
    os.remove("out-1.mp4"), os.mkdir("out-1.mp4")
    assert echo(*words, "out.mp4", "--overwrite")[0] == 2
    assert (folder / "out-0.state.safetensors").read_bytes() == b"a stream"
    assert sorted(os.listdir(folder)) == ["home", "out-0.state.safetensors", "out-1.mp4", "pictures-1"]


def test_videos_that_began_at_different_blocks_are_not_made_longer_together(echo, folder):
    states = batch_states(echo)
    assert echo("--resume", states[0], "--frames", 9, "-o", "new.mp4", "--save", "n.st")[0] == 0
    assert echo("--resume", states[1], "--frames", 30)[0] == 0
    code, _, err = echo(*resume(["n.st", states[1]]), "--frames", 40)
    assert (code, "the videos began at different blocks" in err) == (2, True), err


def test_streams_of_a_batch_are_saved_at_the_same_block(echo, monkeypatch):
    clock, blocks = itertools.count(), []
    monkeypatch.setattr("echo_infinity.record.time.monotonic", lambda: float(next(clock)))
    save = Recorder.save

    def watched(self, path=None):
        blocks.append(self.stream.block)
        return save(self, path)

    monkeypatch.setattr(Recorder, "save", watched)
    assert echo(CIRCLE, "--seed", "1,2", "--frames", 150, "--no-video", "--autosave", "7")[0] == 0
    assert len(blocks) > 4
    assert blocks[::2] == blocks[1::2]


def test_a_stream_that_cant_be_saved_at_the_end_does_not_keep_the_others_from_it(echo, folder, monkeypatch):
    from echo_infinity import state

    save = state.save_file

    def full(tensors, path, metadata):
        if "b-0" in path.name:
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(state, "save_file", full)
    code, _, err = echo(CIRCLE, "--seed", "1,2", "--frames", 9, "-o", "b.mp4", "--save", "b.st")
    assert (code, "could not be saved: b-0.st: No space left on device" in err) == (1, True), err
    assert read_state("b-1.st").meta["blocks"] == 1


def test_states_that_find_no_room_do_not_replace_each_other_elsewhere(echo, folder, monkeypatch):
    from echo_infinity import state

    batch_states(echo)
    for i in range(2):
        (folder / f"{i}").mkdir()
        os.rename(f"b-{i}.st", f"{i}/same.st")
    save = state.save_file

    def full(tensors, path, metadata):
        if not path.parent.samefile(folder / "home"):
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(state, "save_file", full)
    monkeypatch.setattr(Stream, "look_ahead", refuse)
    assert echo(*resume(["0/same.st", "1/same.st"]), "--frames", 40)[0] == 1
    found = sorted((folder / "home").glob("*.st"))
    assert [read_state(path).meta["seed"] for path in found] == [1, 2]


def refuse(self):
    raise ValueError("no more")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (CIRCLE.split(), "8 prompts of one word each: put a prompt of several words in quotes"),
        (["--resume", "b-0.st", "b-1.st"], "the prompt 'b-1.st' names a file: give each saved stream its own --resume"),
        (["b-1.st"], "names a file"),
    ],
)
def test_a_slip_is_not_taken_for_prompts(echo, folder, words, message):
    batch_states(echo)
    code, _, err = echo(*words, "--frames", 40, "-o", "out.mp4")
    assert (code, message in err) == (2, True), err
    assert not list(folder.glob("out*"))
