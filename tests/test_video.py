"""The video a stream leaves behind: every frame once, in order, playable whenever the run is killed."""

import contextlib
import inspect
import json
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from echo_infinity.fmp4 import fragment, parse_fragment, set_frame_duration
from echo_infinity.h264 import H264Encoder
from echo_infinity.video import Mp4Writer, NullWriter, PngWriter, VideoPosition, VideoWriteError, open_writer

SIDE = 64
SIZE = {"width": SIDE, "height": SIDE}


def numbered(first, count):
    """Frames that show their numbers as sixteen dark or bright squares, which survive compression."""
    bits = (np.arange(first, first + count)[:, None] >> np.arange(16)) & 1
    squares = (40 + 175 * bits).astype(np.uint8).reshape(count, 4, 4)
    return squares.repeat(16, 1).repeat(16, 2)[..., None].repeat(3, 3)


# Writes blocks for ever, tells of each, and saves the position now and then, as a stream does.
GENERATE = f"""
import json, os, sys
import numpy as np
from echo_infinity.video import Mp4Writer, VideoPosition

{inspect.getsource(numbered)}

video, state = sys.argv[1:]

def save(position):
    with open(state + ".part", "w") as file:
        json.dump(position.to_dict(), file)
    os.replace(state + ".part", state)

saved = VideoPosition.from_dict(json.load(open(state))) if os.path.exists(state) else None
writer = Mp4Writer(video, width=64, height=64, resume=saved, overwrite=saved is None)
save(writer.position())
frames = writer.position().frames
for block in range(100_000):
    count = 12 if frames else 9
    writer.write(numbered(frames, count))
    frames += count
    print(frames, flush=True)
    if block % 3 == 2:
        save(writer.position())
"""

GROWTH = """
import sys, numpy as np, psutil
from echo_infinity.video import Mp4Writer
frames = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
with Mp4Writer(sys.argv[1], width=16, height=16) as writer:
    for call in range(5500):
        if call == 500:
            start = psutil.Process().memory_info().rss
        writer.write(frames)
    print(writer.position().frames, psutil.Process().memory_info().rss - start)
"""


def decode(path):
    """Return the numbers shown by the frames, and their timestamps in seconds."""
    shown, times = [], []
    with av.open(str(path)) as video:
        for frame in video.decode(video=0):
            squares = frame.to_ndarray(format="gray").reshape(4, 16, 4, 16).mean(axis=(1, 3)).reshape(16)
            shown.append(int(((squares > 127) << np.arange(16)).sum()))
            times.append(frame.pts * frame.time_base)
    return shown, times


def assert_whole(path, frames, fps=16):
    shown, times = decode(path)
    assert shown == list(range(frames))
    assert times == [Fraction(index, fps) for index in range(frames)]


def boxes(data):
    """List (kind, start, end) of the top-level boxes."""
    found, at = [], 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, at, at + size))
        at += size
    assert at == len(data)
    return found


@contextlib.contextmanager
def largest_file(size):
    """Let the kernel refuse bytes beyond this file size, after taking a part of them, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_frame_is_there_once_with_even_timestamps(tmp_path):
    path = tmp_path / "a.mp4"
    with Mp4Writer(path, **SIZE) as writer:
        for first, count in [(0, 9), (9, 12), (21, 0), (21, 1), (22, 200)]:
            writer.write(numbered(first, count))
    assert_whole(path, 222)


@pytest.mark.parametrize("fps", [8, 24, 30])
def test_timestamps_follow_the_frame_rate(tmp_path, fps):
    with Mp4Writer(tmp_path / "a.mp4", **SIZE, fps=fps) as writer:
        writer.write(numbered(0, 40))
    assert_whole(tmp_path / "a.mp4", 40, fps)


def test_resuming_after_every_block_gives_one_valid_file(tmp_path):
    path, position = tmp_path / "a.mp4", None
    for first, count in [(0, 1), (1, 1), (2, 1), (3, 12), (15, 70), (85, 12)]:
        with Mp4Writer(path, **SIZE, resume=position) as writer:
            writer.write(numbered(first, count))
            position = VideoPosition.from_dict(json.loads(json.dumps(writer.position().to_dict())))
            writer.write(numbered(9999, 5))
    with Mp4Writer(path, **SIZE, resume=position):
        pass
    assert path.stat().st_size == position.bytes
    assert_whole(path, 97)

    data = path.read_bytes()
    kinds = [kind for kind, _, _ in boxes(data)]
    assert kinds[:2] == [b"ftyp", b"moov"]
    assert kinds[2:] == [b"moof", b"mdat"] * (len(kinds) // 2 - 1)
    heads = [parse_fragment(data[start:]) for kind, start, _ in boxes(data) if kind == b"moof"]
    assert [head.sequence for head in heads] == list(range(1, len(heads) + 1))
    assert [head.start for head in heads[1:]] == [head.start + head.count * 1024 for head in heads[:-1]]


def test_killed_at_random_instants_and_resumed_nothing_is_lost_or_repeated(tmp_path):
    path, state = tmp_path / "a.mp4", tmp_path / "state.json"
    for blocks in random.sample(range(1, 17), 8):
        command = [sys.executable, "-c", GENERATE, str(path), str(state)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            told = [int(process.stdout.readline()) for _ in range(blocks)]
            time.sleep(random.uniform(0, 0.008))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        saved = VideoPosition.from_dict(json.loads(state.read_text()))
        shown, _ = decode(path)
        assert shown == list(range(len(shown)))
        assert len(shown) >= max(saved.frames, told[-1])
    with Mp4Writer(path, **SIZE, resume=saved) as writer:
        assert_whole(path, saved.frames)
        writer.write(numbered(saved.frames, 50))
    assert_whole(path, saved.frames + 50)


def test_a_half_written_fragment_is_ignored_wherever_it_breaks_off(tmp_path):
    path = tmp_path / "a.mp4"
    with Mp4Writer(path, **SIZE) as writer:
        writer.write(numbered(0, 12))
        kept = writer.position()
        writer.write(numbered(12, 12))
    data = path.read_bytes()
    unfinished = data[: kept.bytes + 4] + b"free" + data[kept.bytes + 8 :]
    for length in [*range(kept.bytes, kept.bytes + 20), *range(kept.bytes + 20, len(data), 97), len(data)]:
        path.write_bytes(unfinished[:length])
        assert_whole(path, 12)
        with Mp4Writer(path, **SIZE, resume=kept) as writer:
            writer.write(numbered(12, 1))
        assert_whole(path, 13)


def test_a_full_disk_keeps_the_video_playable_and_the_same_call_works_once_there_is_room(tmp_path):
    path = tmp_path / "a.mp4"
    with Mp4Writer(path, **SIZE) as writer:
        writer.write(numbered(0, 30))
        before = writer.position()
        with largest_file(before.bytes + 500), pytest.raises(VideoWriteError, match="largest size allowed") as error:
            writer.write(numbered(30, 200))
        assert error.value.path == path
        assert writer.position() == before
        assert path.stat().st_size == before.bytes
        assert_whole(path, 30)
        writer.write(numbered(30, 200))
    assert_whole(path, 230)


def test_a_disk_without_space_is_named_at_the_start(tmp_path):
    path = tmp_path / "a.mp4"
    path.symlink_to("/dev/full")
    with pytest.raises(VideoWriteError, match="disk is full"):
        Mp4Writer(path, **SIZE, overwrite=True)


def test_an_interrupt_inside_a_write_loses_only_that_call(tmp_path, monkeypatch):
    encode, calls = H264Encoder.encode, []

    def interrupted(self, frame):
        calls.append(frame)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return encode(self, frame)

    monkeypatch.setattr(H264Encoder, "encode", interrupted)
    with Mp4Writer(tmp_path / "a.mp4", **SIZE) as writer:
        writer.write(numbered(0, 12))
        with pytest.raises(KeyboardInterrupt):
            writer.write(numbered(12, 100))
        assert writer.position().frames == 12
        writer.write(numbered(12, 100))
    assert_whole(tmp_path / "a.mp4", 112)


def test_metadata_is_readable_and_survives_a_resume(tmp_path):
    told = {"prompt": 'a fox, 狐 "é"\nthen snow', "seed": 7, "version": "0.1.0"}
    with Mp4Writer(tmp_path / "a.mp4", **SIZE, metadata=told) as writer:
        writer.write(numbered(0, 2))
    with Mp4Writer(tmp_path / "a.mp4", **SIZE, resume=writer.position()) as writer:
        writer.write(numbered(2, 2))
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert {key: video.metadata[key] for key in told} == {key: str(value) for key, value in told.items()}


def test_memory_does_not_grow_with_the_video(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "a.mp4")], check=True, capture_output=True, text=True
    )
    frames, growth = map(int, answer.stdout.split())
    assert frames == 22_000
    assert growth < 2**20


def test_timestamps_do_not_overflow_after_weeks(tmp_path):
    encoder = H264Encoder(**SIZE, fps=16, metadata={})
    weeks = 100 * 86_400 * 16
    samples = [encoder.encode(frame) for frame in numbered(0, 2)]
    (tmp_path / "a.mp4").write_bytes(encoder.init + fragment(1, weeks * 1024, samples))
    shown, times = decode(tmp_path / "a.mp4")
    assert (shown, times) == ([0, 1], [Fraction(weeks, 16), Fraction(weeks + 1, 16)])


def test_a_frame_rate_without_whole_ticks_is_refused():
    with pytest.raises(ValueError, match="16384 is no multiple of 7"):
        set_frame_duration(H264Encoder(**SIZE, fps=16, metadata={}).init, 7)


def test_colours_are_those_of_bt709(tmp_path):
    frame = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    frame[..., 0] = 255
    with Mp4Writer(tmp_path / "a.mp4", **SIZE) as writer:
        writer.write(frame)
    with av.open(str(tmp_path / "a.mp4")) as video:
        picture = next(video.decode(video=0))
    luma = picture.to_ndarray()[:SIDE].mean()
    bt709, bt601 = 16 + 219 * 0.2126, 16 + 219 * 0.299
    assert abs(luma - bt709) < abs(luma - bt601)
    assert (picture.colorspace, picture.color_range) == (1, 1)


def test_torch_frames_and_strided_frames_are_written_as_they_look(tmp_path):
    frames = torch.from_numpy(numbered(0, 24))
    with Mp4Writer(tmp_path / "a.mp4", **SIZE) as writer:
        writer.write(frames[:12])
        writer.write(frames[12:].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    assert_whole(tmp_path / "a.mp4", 24)


def test_real_geometry_is_written(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (2, 480, 832, 3), dtype=np.uint8)
    with Mp4Writer(tmp_path / "a.mp4", width=832, height=480) as writer:
        writer.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(832, 480)] * 2


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 3, 64, 64), np.uint8), r"shape \(1, 3, 64, 64\), expected \(N, 64, 64, 3\)"),
        (np.zeros((64, 64, 3), np.uint8), r"shape \(64, 64, 3\), expected"),
        (np.zeros((1, 64, 64, 3), np.float32), "dtype float32, expected uint8"),
        (torch.zeros(1, 64, 64, 3, dtype=torch.uint8, device="meta"), "device meta, expected the CPU"),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_frames_of_another_kind_are_refused(tmp_path, name, frames, message):
    with open_writer(tmp_path / name, **SIZE) as writer, pytest.raises(ValueError, match=message):
        writer.write(frames)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"width": 63}, "width must be even .* got 63"),
        ({"height": 0}, "height must be even .* got 0"),
        ({"width": 20_000}, "got 20000"),
        ({"fps": 0}, "fps must be >= 1, got 0"),
    ],
)
def test_sizes_that_h264_cannot_hold_are_refused(tmp_path, size, message):
    with pytest.raises(ValueError, match=message):
        Mp4Writer(tmp_path / "a.mp4", **{**SIZE, **size})
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing/a.mp4", "the folder .*missing doesn't exist; create it"),
        ("file/a.mp4", "file is a file, not a folder"),
        ("folder.mp4", "this is a folder|exists already"),
        ("there.mp4", "exists already; resume its stream"),
        ("file/frames", "file is a file, not a folder|not a folder"),
        ("file", "file is a file, not a folder"),
        ("missing/deep/frames", "doesn't exist; create it"),
    ],
)
def test_places_that_cannot_be_written_are_named_and_left_alone(tmp_path, place, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there.mp4").write_text("mine")
    (tmp_path / "folder.mp4").mkdir()
    open_as = Mp4Writer if place.endswith("mp4") else PngWriter
    with pytest.raises(VideoWriteError, match=message):
        open_as(tmp_path / place, **SIZE)
    assert (tmp_path / "file").read_text() == (tmp_path / "there.mp4").read_text() == "mine"


def test_no_permission_is_named(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(VideoWriteError, match="no permission to write here"):
        Mp4Writer(tmp_path / "a.mp4", **SIZE)


def test_overwriting_replaces_the_file(tmp_path):
    for count in (30, 5):
        with Mp4Writer(tmp_path / "a.mp4", **SIZE, overwrite=True) as writer:
            writer.write(numbered(0, count))
    assert_whole(tmp_path / "a.mp4", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, _: path.unlink(), "the file is gone"),
        (lambda path, _: path.write_bytes(path.read_bytes()[:-1]), r"has \d+ bytes, the saved stream had written \d+"),
        (lambda path, _: path.write_bytes(b"\0\0\0\x08free" * 9000), "not the start of a fragmented H.264 mp4"),
        (lambda _, options: options.update(width=128), "the file is 64 x 64, the stream gives 128 x 64"),
        (lambda _, options: options.update(fps=24), "the file has 16 frames a second, the stream 24"),
        (lambda _, options: options.update(preset="ultrafast"), "other settings or another x264"),
        (lambda _, options: options.update(resume=VideoPosition(frames=5)), "the saved stream wrote no mp4"),
        (lambda _, options: options.update(resume=VideoPosition(24, 2000, 1000)), "at byte 1000: boxes"),
    ],
)
def test_a_resume_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, change, message):
    path = tmp_path / "a.mp4"
    with Mp4Writer(path, **SIZE) as writer:
        writer.write(numbered(0, 12))
        writer.write(numbered(12, 12))
    options = {**SIZE, "resume": writer.position()}
    change(path, options)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(VideoWriteError, match=message):
        Mp4Writer(path, **options)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_resume_of_another_stream_with_the_same_settings_is_refused(tmp_path):
    positions = []
    for name, count in [("a.mp4", 12), ("b.mp4", 10)]:
        with Mp4Writer(tmp_path / name, **SIZE) as writer:
            writer.write(numbered(0, count))
            positions.append(writer.position())
    with pytest.raises(VideoWriteError, match=r"the file has 12 frames at byte \d+, .* had 10 frames at byte"):
        Mp4Writer(tmp_path / "a.mp4", **SIZE, resume=positions[1])


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_a_closed_writer_refuses_frames_and_still_tells_its_position(tmp_path, name):
    with open_writer(tmp_path / name, **SIZE) as writer:
        writer.write(numbered(0, 3))
    with pytest.raises(ValueError, match="is closed"):
        writer.write(numbered(3, 1))
    assert writer.position().frames == 3


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"frames": 1}, "has the keys"),
        ({"frames": 1, "bytes": -1, "last_fragment": 0}, "bytes must be an integer >= 0, got -1"),
        ({"frames": True, "bytes": 1, "last_fragment": 0}, "frames must be an integer >= 0, got True"),
    ],
)
def test_a_damaged_position_is_refused(saved, message):
    with pytest.raises(ValueError, match=message):
        VideoPosition.from_dict(saved)


@pytest.mark.parametrize(
    ("name", "first"), [("frames", "frames/frame_000000000.png"), ("shot_%03d.png", "shot_000.png")]
)
def test_png_frames_are_exact_and_a_resume_deletes_what_lies_beyond(tmp_path, name, first):
    source = np.random.default_rng(0).integers(0, 255, (9, 5, 7, 3), dtype=np.uint8)
    other = {"width": 7, "height": 5, "metadata": {"prompt": "狐", "seed": 3}}
    with PngWriter(tmp_path / name, **other) as writer:
        writer.write(source[:4])
        saved = writer.position()
        writer.write(255 - source[:5])
    with PngWriter(tmp_path / name, **other, resume=saved) as writer:
        assert len(list((tmp_path / first).parent.glob("*.png"))) == 4
        writer.write(source[4:])
    files = sorted((tmp_path / first).parent.glob("*.png"))
    assert files[0] == tmp_path / first
    assert len(files) == len(source)
    for file, frame in zip(files, source, strict=True):
        with av.open(str(file)) as picture:
            np.testing.assert_array_equal(next(picture.decode(video=0)).to_ndarray(format="rgb24"), frame)
    assert b"iTXtprompt\0\0\0\0\0" + "狐".encode() in files[0].read_bytes()


def test_a_png_resume_with_missing_frames_is_refused(tmp_path):
    with PngWriter(tmp_path / "frames", **SIZE) as writer:
        writer.write(numbered(0, 5))
    (tmp_path / "frames" / "frame_000000002.png").unlink()
    with pytest.raises(VideoWriteError, match="5 frames were saved but 4 of them are left"):
        PngWriter(tmp_path / "frames", **SIZE, resume=writer.position())
    with pytest.raises(VideoWriteError, match="is gone"):
        PngWriter(tmp_path / "elsewhere", **SIZE, resume=writer.position())


def test_a_png_folder_in_use_needs_leave_to_overwrite(tmp_path):
    with PngWriter(tmp_path / "frames", **SIZE) as writer:
        writer.write(numbered(0, 5))
    with pytest.raises(VideoWriteError, match="holds 5 frames already"):
        PngWriter(tmp_path / "frames", **SIZE)
    with PngWriter(tmp_path / "frames", **SIZE, overwrite=True) as writer:
        writer.write(numbered(0, 2))
    assert len(list((tmp_path / "frames").iterdir())) == 2


def test_a_full_disk_leaves_only_whole_png_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1, SIDE, SIDE, 3), dtype=np.uint8)
    with PngWriter(tmp_path / "frames", **SIZE) as writer:
        writer.write(numbered(0, 3))
        with largest_file(5000), pytest.raises(VideoWriteError, match="largest size allowed"):
            writer.write(np.concatenate([numbered(3, 1), noise]))
        assert writer.position().frames == 3
        assert len(list((tmp_path / "frames").iterdir())) == 3
        writer.write(numbered(3, 1))
    assert len(list((tmp_path / "frames").iterdir())) == 4


@pytest.mark.parametrize("name", ["frame.png", "a_%d_%d.png"])
def test_a_png_pattern_must_number_the_frames_once(tmp_path, name):
    with pytest.raises(ValueError, match="must number the frames once"):
        PngWriter(tmp_path / name, **SIZE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.mp4", Mp4Writer), ("A.MP4", Mp4Writer), ("frames", PngWriter), ("x_%04d.png", PngWriter), (None, NullWriter)],
)
def test_the_path_chooses_the_writer(tmp_path, name, kind):
    with open_writer(name and tmp_path / name, **SIZE) as writer:
        assert type(writer) is kind
        writer.write(numbered(0, 3))
        assert writer.position().frames == 3
    with open_writer(name and tmp_path / name, **SIZE, resume=writer.position()) as writer:
        writer.write(numbered(3, 2))
        assert writer.position().frames == 5


@pytest.mark.parametrize("name", ["a.avi", "a.webm"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected \.mp4, \.png"):
        open_writer(tmp_path / name, **SIZE)
