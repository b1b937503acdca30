"""The command line: what it makes, and how it stops."""

import contextlib
import hashlib
import itertools
import os
import resource
import shlex
import signal
import threading
import time

import av
import pytest
import torch
from echo_infinity import cli
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.record import append_line
from echo_infinity.state import read_state
from echo_infinity.stream import Stream
from running import frames_of, hashes_of
from small import CIRCLE, SQUARE


@contextlib.contextmanager
def stopping(number, after=0.4):
    """Send a signal to this process once its generation is under way."""
    timer = threading.Timer(after, os.kill, (os.getpid(), number))
    timer.start()
    yield
    timer.join()


def test_a_video_has_exactly_the_length_asked_for(echo, folder):
    code, out, err = echo(CIRCLE, "--seconds", 2.5, "-o", "out.mp4")
    assert (code, err) == (0, "")
    assert "40 frames, 2.50 s" in out
    assert frames_of("out.mp4") == list(range(40))
    assert sorted(os.listdir(folder)) == ["home", "out.mp4"]  # a finished run leaves no state behind


@pytest.mark.parametrize(
    ("words", "frames"), [(["--minutes", 0.02], 19), (["--hours", 0.0005], 29), (["--frames", 5], 5)]
)
def test_lengths_come_in_several_units(echo, words, frames):
    code, out, _ = echo(CIRCLE, *words, "--no-video")
    assert code == 0
    assert f"no video: {frames} frames" in out


def test_pictures_go_to_a_folder(echo, folder):
    assert echo(CIRCLE, "--frames", 10, "-o", "pictures")[0] == 0
    assert len(list((folder / "pictures").glob("*.png"))) == 10


def test_the_video_keeps_prompt_and_seed(echo):
    echo(CIRCLE, "--frames", 9, "--seed", 5, "-o", "out.mp4")
    with av.open("out.mp4") as video:
        assert (video.metadata["prompt"], video.metadata["seed"]) == (CIRCLE, "5")


def test_a_saved_video_can_be_made_longer_without_a_seam(echo, folder):
    assert echo(CIRCLE, "--frames", 60, "-o", "whole.mp4", "--raw-hashes", "whole.txt")[0] == 0
    assert echo(CIRCLE, "--frames", 31, "-o", "a.mp4", "--save", "a.safetensors", "--raw-hashes", "a.txt")[0] == 0
    assert len(read_state("a.safetensors").tensors["video.rest"]) == 2  # of 33 generated frames
    assert echo("--resume", "a.safetensors", "--frames", 60, "--raw-hashes", "a.txt")[0] == 0
    assert hashes_of(folder / "a.txt") == hashes_of(folder / "whole.txt")
    assert frames_of("a.mp4") == list(range(60))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_printed_command_goes_on(echo, folder, number):
    before = signal.getsignal(number)
    with stopping(number):
        code, out, err = echo(CIRCLE, "--endless", "-o", "out.mp4", "--raw-hashes", "h.txt")
    assert (code, out) == (130, "")
    assert signal.getsignal(number) is before
    (command,) = [line for line in err.splitlines() if line.startswith("  echo-infinity generate --resume ")]
    blocks = read_state("out.state.safetensors").meta["blocks"]
    frames = 12 * blocks - 3
    assert frames_of("out.mp4") == list(range(frames))
    assert f"stopped after {frames} frames" in err
    assert echo(*shlex.split(command)[2:], "--frames", frames + 20)[0] == 0
    assert frames_of("out.mp4") == list(range(frames + 20))
    assert len(hashes_of(folder / "h.txt")) == blocks + 2


def test_a_second_signal_stops_at_once(echo, monkeypatch):
    def never(self, stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("echo_infinity.record.Recorder.run", never)
    assert echo(CIRCLE, "--endless", "--no-video")[0] == 130


def test_a_prompt_beside_resume_takes_over_at_the_next_block(echo):
    echo(CIRCLE, "--frames", 33, "--no-video", "--save", "s.safetensors")
    assert echo(SQUARE, "--resume", "s.safetensors", "--frames", 50)[0] == 0
    changes = [(c["prompt"], c["block"]) for c in read_state("s.safetensors").meta["prompts"]]
    assert changes == [(CIRCLE, 0), (SQUARE, 3)]


def test_resume_keeps_memory_threads_and_model(echo, small_folder):
    echo(CIRCLE, "--frames", 4, "--no-video", "--save", "s.safetensors", "--memory", "frozen", "--threads", 2)
    torch.set_num_threads(1)
    code, _, err = echo("--resume", "s.safetensors", "--frames", 9)
    assert (code, err) == (0, "")  # no warning of another thread count
    meta = read_state("s.safetensors").meta
    assert (meta["memory"], meta["source"], meta["environment"]["threads"]) == ("frozen", small_folder, 2)


def test_a_resumed_stream_may_start_another_video(echo):
    echo(CIRCLE, "--frames", 33, "-o", "one.mp4", "--save", "s.safetensors")
    assert echo("--resume", "s.safetensors", "--frames", 20, "-o", "two.mp4")[0] == 0
    assert frames_of("one.mp4") == list(range(33))
    assert frames_of("two.mp4") == list(range(20))


def test_a_moved_video_is_found_where_it_is_said_to_be(echo):
    echo(CIRCLE, "--frames", 33, "-o", "one.mp4", "--save", "s.safetensors")
    os.rename("one.mp4", "moved.mp4")
    code, _, err = echo("--resume", "s.safetensors", "--frames", 40)
    assert code == 2
    assert "the file is gone" in err
    assert echo("--resume", "s.safetensors", "--frames", 40, "-o", "moved.mp4")[0] == 0
    assert frames_of("moved.mp4") == list(range(40))


@contextlib.contextmanager
def disk_of(size):
    """Let no file grow past ``size`` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_a_playable_video_and_a_stream_that_goes_on(echo, folder):
    echo(CIRCLE, "--frames", 400, "-o", "whole.mp4", "--raw-hashes", "whole.txt")
    state_bytes = 110_000  # the small state fits, all of the video doesn't
    assert os.path.getsize("whole.mp4") > state_bytes
    with disk_of(state_bytes):
        code, _, err = echo(CIRCLE, "--frames", 400, "-o", "out.mp4", "--raw-hashes", "h.txt")
    assert code == 1
    assert "the video so far is playable" in err
    written = frames_of("out.mp4")
    assert 0 < len(written) < 400
    assert written == list(range(len(written)))
    assert echo("--resume", "out.state.safetensors", "--raw-hashes", "h.txt")[0] == 0
    assert frames_of("out.mp4") == list(range(400))
    assert hashes_of(folder / "h.txt") == hashes_of(folder / "whole.txt")


def test_a_state_that_finds_no_room_goes_elsewhere_and_the_old_one_stays(echo, folder, monkeypatch):
    echo(CIRCLE, "--frames", 33, "--no-video", "--save", "s.safetensors")
    good = (folder / "s.safetensors").read_bytes()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder / "missing"))
    from echo_infinity import state

    save = state.save_file

    def full(tensors, path, metadata):
        if path.parent.samefile(folder):
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(state, "save_file", full)
    with stopping(signal.SIGINT):
        code, _, err = echo("--resume", "s.safetensors", "--endless")
    assert code == 130
    assert "could not save the stream: s.safetensors: No space left on device" in err
    (elsewhere,) = (folder / "home").glob("*s.safetensors")
    assert f"--resume {elsewhere}" in err
    assert (folder / "s.safetensors").read_bytes() == good
    assert read_state(elsewhere).meta["frames"] > 33


def test_without_any_room_the_last_good_state_is_named(echo, folder, monkeypatch):
    echo(CIRCLE, "--frames", 33, "--no-video", "--save", "s.safetensors")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("echo_infinity.state.save_file", full)
    with stopping(signal.SIGINT):
        code, _, err = echo("--resume", "s.safetensors", "--endless", "--autosave", 0.1)
    assert code == 130
    assert "going on" in err  # autosaves failed and did not end the run
    assert "the last good state is kept; go on from it with:\n  echo-infinity generate --resume s.safetensors" in err
    assert read_state("s.safetensors").meta["frames"] == 33


def test_nan_ends_the_run_and_keeps_the_last_good_state(echo, monkeypatch):
    from echo_infinity import noise, stream

    def broken(seed):
        good = noise.counter_noise(seed)
        return lambda block, step, shape: good(block, step, shape) * (float("nan") if block == 4 else 1.0)

    monkeypatch.setattr(stream, "counter_noise", broken)
    code, _, err = echo(CIRCLE, "--frames", 100, "-o", "out.mp4", "--autosave", 0)
    assert code == 1
    assert "block 4 holds NaN or Inf" in err
    assert "--resume out.state.safetensors" in err
    assert len(frames_of("out.mp4")) == 45
    monkeypatch.setattr(stream, "counter_noise", noise.counter_noise)
    assert echo("--resume", "out.state.safetensors")[0] == 0
    assert frames_of("out.mp4") == list(range(100))


@pytest.mark.parametrize("place", ["generating", "decoding"])
def test_a_value_error_in_mid_run_leaves_a_playable_video_and_a_stream_that_goes_on(echo, folder, monkeypatch, place):
    plain, calls = Stream.next_latents if place == "generating" else Stream.decode, [0]

    def broken(self, *args):
        calls[0] += 1
        if calls[0] == 4:
            raise ValueError("no such shape")
        return plain(self, *args)

    assert echo(CIRCLE, "--frames", 69, "--no-video", "--raw-hashes", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stream, plain.__name__, broken)
        code, _, err = echo(CIRCLE, "--frames", 69, "-o", "out.mp4", "--raw-hashes", "halves", "--autosave", 0)
    assert code == 1
    assert "error: no such shape\n" in err
    written = frames_of(folder / "out.mp4")
    assert written == list(range(len(written)))
    assert f"the video so far is playable: {folder / 'out.mp4'}, {len(written)} frames" in err
    assert "the stream is saved; go on with:" in err
    assert echo("--resume", "out.state.safetensors", "--raw-hashes", "halves")[0] == 0
    assert hashes_of(folder / "halves") == hashes_of(folder / "whole")
    assert frames_of(folder / "out.mp4") == list(range(69))


def test_unknown_words_are_a_warning_line(echo):
    code, _, err = echo("a red zebra drifts over a dark field", "--frames", 9, "--no-video")
    assert code == 0
    assert err.startswith("echo-infinity: warning: unknown words left out: zebra")


def test_no_video_with_resume_counts_on(echo):
    echo(CIRCLE, "--frames", 33, "--no-video", "--save", "s.safetensors")
    code, out, _ = echo("--resume", "s.safetensors", "--frames", 45)
    assert code == 0
    assert "no video: 45 frames" in out


def test_a_line_is_appended_whole(folder):
    append_line(folder / "h.txt", "0 abc\n")
    append_line(folder / "h.txt", "1 def\n")
    assert (folder / "h.txt").read_text() == "0 abc\n1 def\n"


def test_info_names_versions_build_and_presets(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (
        "echo-infinity 0.",
        f"torch {torch.__version__}",
        "why_no_kernels",
        "tiny: 64 x 64",
        "wan2.1-1.3b: 832",
    ):
        assert word in out


def test_delegated_commands_take_their_modules_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "codec", "--help"])
    assert stop.value.code == 0
    assert "--latent-frames" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "codec", "--no-such-option"])
    assert stop.value.code == 2


def test_a_png_video_resumes_too(echo, folder):
    echo(CIRCLE, "--frames", 20, "-o", "pictures", "--save", "s.safetensors")
    assert echo("--resume", "s.safetensors", "--frames", 30)[0] == 0
    assert len(list((folder / "pictures").glob("*.png"))) == 30


def test_the_thread_beside_writes_the_streams_own_frames(echo, folder, small_folder):
    echo(CIRCLE, "--frames", 60, "--seed", 3, "-o", "out.mp4", "--raw-hashes", "h.txt")
    stream = EchoPipeline.from_pretrained(small_folder).stream(CIRCLE, seed=3)
    expected = [hashlib.sha256(next(stream).numpy().data).hexdigest() for _ in range(6)]
    assert hashes_of(folder / "h.txt")[:6] == expected
    assert len(frames_of("out.mp4")) == 60


def test_a_lost_device_in_mid_run_names_the_last_good_state(echo, folder, monkeypatch):
    plain, calls = Stream.next_latents, itertools.count()

    def lost(self):
        if next(calls) >= 3:
            monkeypatch.setattr(Stream, "save", broken)
            raise RuntimeError("CUDA error: unspecified launch failure")
        return plain(self)

    def broken(self, *_, **__):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Stream, "next_latents", lost)
    code, _, err = echo(CIRCLE, "--frames", 69, "-o", "out.mp4", "--autosave", 0)
    assert code == 1
    assert "error: CUDA error: unspecified launch failure" in err
    assert "the last good state is kept; go on from it with:" in err
    assert read_state("out.state.safetensors").meta["blocks"] >= 2
