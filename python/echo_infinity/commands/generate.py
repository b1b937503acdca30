"""``echo-infinity generate``: check the request, run the stream into its video, and lose nothing on the way out."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from echo_ext import __version__
from echo_infinity.commands import UserError
from echo_infinity.commands.places import hold_places, state_path
from echo_infinity.finite import NonFiniteError
from echo_infinity.parallel import ProcessesError, Ranks, join_ranks, lead, leave_ranks
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.record import Recorder, append_line, resident_bytes, save_somewhere
from echo_infinity.settings import frame_count
from echo_infinity.state import SavedStream, SavedVideo, read_state
from echo_infinity.stream import Stream
from echo_infinity.video import NullWriter, VideoPosition, VideoWriteError, VideoWriter, open_writer

# Blocks of fewer values than this (tokens x width) are done sooner by one thread than shared out.
_SMALL_BLOCK = 2**17
_PARTS = ("text", "text_device", "text_keep", "decoder", "decoder_dtype", "weights", "kv")
# What may differ when a stream goes on; another decoder or size needs a new stream.
_LOWER = (
    "to take less, add --text-device cpu, --decoder-dtype bfloat16, --kv fp8 or --weights fp8; "
    "'echo-infinity plan --gpu 24GB' says what fits"
)
_REFUSALS = (ValueError, OSError, ImportError, VideoWriteError)
_EVERY = 0.2  # seconds between refreshes of the progress bar


@dataclass(frozen=True)
class _Job:
    """A checked request, with everything open."""

    stream: Stream
    writer: VideoWriter
    output: str | None
    target: int | None
    state: Path


def run(args: argparse.Namespace) -> int:
    """Generate as the options say and return the exit code: 0 done, 130 interrupted, 1 a failure on the way.

    Under torchrun all processes share the work, and the first one does the rest.

    Raises:
        UserError: the request can't be served; nothing was generated.
    """
    ranks = join_ranks()
    try:
        saved = None if args.resume is None else read_state(args.resume)
        _check_options(args, saved)
        pipe = _load(args, saved, ranks)
        kept = [saved]
        del saved  # the stream has copies of its own: a long run must not hold the file's as well
        if ranks.rank:
            kept.clear()
            _leave_signals_to_the_first()
        return lead(pipe, lambda: _generate(args, _prepare(args, pipe, kept.pop()))) or 0
    except (*_REFUSALS, torch.OutOfMemoryError) as error:
        reason = f"{_no_room(error)}; {_LOWER}" if isinstance(error, torch.OutOfMemoryError) else str(error)
        if ranks.rank:
            _say(f"process {ranks.rank}: {reason}")
            return 2
        raise UserError(reason) from error
    finally:
        leave_ranks()


def _generate(args: argparse.Namespace, job: _Job) -> int:
    begun, first = time.monotonic(), job.writer.position().frames
    fps = job.stream.pipe.fps
    with job.writer, job.stream, _progress(args.quiet, job.target, first, fps) as show, _Stop() as stop:
        recorder = Recorder(
            job.stream,
            job.writer,
            path=job.output,
            target=job.target,
            save=job.state,
            autosave=args.autosave,
            hashes=args.raw_hashes,
            on_block=show,
            on_trouble=_say,
        )
        try:
            done = recorder.run(stop)
        except (NonFiniteError, ProcessesError, VideoWriteError, ValueError, OSError) as error:
            return _failed(args, recorder, error)
        except torch.OutOfMemoryError as error:
            code = _failed(args, recorder, RuntimeError(_no_room(error)))
            _say(_LOWER)
            return code
        if not done:
            return _interrupted(args, recorder)
        if args.save is not None or args.autosave is not None or args.resume is not None:
            kept, reasons = save_somewhere(recorder, [job.state])
            if kept is None:
                _say(f"the video is complete, but the stream could not be saved: {reasons[-1]}")
                return 1
    seconds = time.monotonic() - begun
    speed = (recorder.written - first) / fps / seconds
    tqdm.write(
        f"{job.output or 'no video'}: {recorder.written} frames, {recorder.written / fps:.2f} s; "
        f"generated in {seconds:.1f} s, {speed:.1f} x real time"
    )
    return 0


def _prepare(args: argparse.Namespace, pipe: EchoPipeline, saved: SavedStream | None) -> _Job:
    """Check everything that can be checked before the first block, the cheap things first."""
    stream = _open_stream(args, pipe, saved)
    position, output = _find_video(args, saved)
    target = _target(args, saved, position, pipe.fps)
    state = Path(args.save or args.resume or state_path(args.output or output))
    hold_places(state, keep=args.resume, overwrite=args.overwrite)
    if args.raw_hashes is not None:
        append_line(args.raw_hashes, "")
    if output is None:
        return _Job(stream, NullWriter(resume=position), None, target, state)
    height, width = pipe.size
    writer = open_writer(
        output,
        width=width,
        height=height,
        fps=pipe.fps,
        metadata={"prompt": stream.prompt, "seed": stream.settings.seed, "version": f"echo-infinity {__version__}"},
        resume=position,
        overwrite=args.overwrite,
    )
    return _Job(stream, writer, output, target, state)


def _check_options(args: argparse.Namespace, saved: SavedStream | None) -> None:
    if saved is None and args.prompt is None:
        raise ValueError('what should it show? Give a prompt, such as "a red circle drifts over a dark field"')
    if saved is None and args.output is None and not args.no_video:
        raise ValueError("where should the video go? Give -o out.mp4, -o FOLDER for PNG files, or --no-video")
    if saved is not None:
        for name in ("seed", "memory"):
            if getattr(args, name) not in (None, saved.meta[name]):
                raise ValueError(f"--{name} of a resumed stream can't change: it is {saved.meta[name]}; leave it out")
        if saved.meta["output_type"] != "pixels" or saved.meta["noise"] != "counter":
            raise ValueError(f"{saved.path} ran with latents or the caller's own noise: resume it from Python")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if args.autosave is not None and not args.autosave >= 0:
        raise ValueError(f"--autosave is seconds >= 0, got {args.autosave}")


def _load(args: argparse.Namespace, saved: SavedStream | None, ranks: Ranks) -> EchoPipeline:
    then = {} if saved is None else saved.meta["environment"]
    cuda = ranks.device.type == "cuda" and then.get("device", "cuda").startswith("cuda")
    device = args.device or ("cuda" if cuda else "cpu")
    if ranks.mesh is not None and device == "cuda":
        device = str(ranks.device)  # each process its own
    model = args.model or (saved.meta["source"] if saved is not None else None) or "tiny"
    dtype = getattr(torch, args.dtype or then.get("dtype", "float32").partition(",")[0])
    parts: dict[str, Any] = {} if saved is None else dict(saved.meta.get("parts", {}))
    parts |= {name: getattr(args, name) for name in _PARTS if getattr(args, name) is not None}
    if "decoder_dtype" in parts:
        parts["decoder_dtype"] = getattr(torch, parts["decoder_dtype"])
    pipe = EchoPipeline.from_pretrained(model, dtype=dtype, device=device, ranks=ranks, **parts)
    c = pipe.config
    small = c.window.frames_per_block * c.tokens_per_frame * c.model.width < _SMALL_BLOCK
    torch.set_num_threads(args.threads or then.get("threads") or (1 if small else torch.get_num_threads()))
    return pipe


def _open_stream(args: argparse.Namespace, pipe: EchoPipeline, saved: SavedStream | None) -> Stream:
    if saved is None:
        return pipe.stream(args.prompt, seed=0 if args.seed is None else args.seed, memory=args.memory)
    stream = pipe.resume(saved)
    if args.prompt is not None and args.prompt != stream.prompt:
        stream.switch(args.prompt)
    return stream


def _find_video(args: argparse.Namespace, saved: SavedStream | None) -> tuple[VideoPosition | None, str | None]:
    """Where the video goes, and the position at which it goes on, if it does."""
    video: SavedVideo | None = None if saved is None else saved.video
    if args.no_video:
        return (None if video is None else VideoPosition(frames=video.position.frames)), None
    if args.output is None:
        return (None, None) if video is None else (video.position, video.path)
    output = os.path.abspath(args.output)
    if video is None or video.path is None or (output != video.path and not os.path.exists(output)):
        return None, output
    return video.position, output


def _target(
    args: argparse.Namespace, saved: SavedStream | None, position: VideoPosition | None, fps: int
) -> int | None:
    """Frames that the whole video is to have; None for endless."""
    if args.endless:
        return None
    units = {"seconds": 1, "minutes": 60, "hours": 3600}
    given = [getattr(args, name) * unit for name, unit in units.items() if getattr(args, name) is not None]
    target: int | None
    if given:
        target = frame_count(given[0], fps)
    elif args.frames is not None:
        target = args.frames
    elif saved is not None and saved.video is not None and position is not None:
        target = saved.video.target
    else:
        raise ValueError("how long? Give --seconds, --minutes, --hours, --frames or --endless")
    have = 0 if position is None else position.frames
    if target is not None and target <= have:
        if have:
            raise ValueError(f"the video has {have} frames ({have / fps:.2f} s) already: ask for more, or --endless")
        raise ValueError(f"the length must be at least one frame, got {target}")
    return target


def _no_room(error: torch.OutOfMemoryError) -> str:
    return f"out of memory: {str(error).splitlines()[0]}"


def _interrupted(args: argparse.Namespace, recorder: Recorder) -> int:
    _say(f"stopped after {recorder.written} frames")
    _save_and_tell(args, recorder)
    return 130


def _failed(args: argparse.Namespace, recorder: Recorder, error: Exception) -> int:
    _say(f"error: {error}")
    if recorder.path is not None:
        _say(f"the video so far is playable: {recorder.path}, {recorder.written} frames")
    if isinstance(error, NonFiniteError | ProcessesError):
        _tell_last_good(args, recorder)
    else:
        _save_and_tell(args, recorder)
    return 1


def _save_and_tell(args: argparse.Namespace, recorder: Recorder) -> None:
    name = Path(recorder.state or "echo.state.safetensors").name
    spare = [Path(folder) / f"{os.getpid()}-{name}" for folder in (tempfile.gettempdir(), Path.home(), Path.cwd())]
    saved, reasons = save_somewhere(recorder, [*([recorder.state] if recorder.state else []), *spare])
    for reason in reasons:
        _say(f"could not save the stream: {reason}")
    if saved is None:
        _tell_last_good(args, recorder)
    else:
        _say(f"the stream is saved; go on with:\n  {_resume_command(args, saved)}")


def _tell_last_good(args: argparse.Namespace, recorder: Recorder) -> None:
    last = recorder.saved or args.resume
    if last is None:
        _say("no state was saved before; --autosave SECONDS would keep one")
    else:
        _say(f"the last good state is kept; go on from it with:\n  {_resume_command(args, Path(last))}")


def _resume_command(args: argparse.Namespace, state: Path) -> str:
    words = ["echo-infinity", "generate", "--resume", str(state)]
    for name in ("save", "autosave", "raw_hashes", "device"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join(words + (["--no-video"] if args.no_video else []))


@contextlib.contextmanager
def _progress(quiet: bool, target: int | None, first: int, fps: int) -> Iterator[Callable[[int], None]]:
    """Show frames, speed and memory; a terminal's bar, nothing where the output is a file."""
    bar = tqdm(total=target, initial=first, unit="frame", mininterval=_EVERY, disable=True if quiet else None)
    begun, shown = time.monotonic(), [0.0]

    def show(frames: int) -> None:
        now = time.monotonic()
        if bar.disable or (now - shown[0] < _EVERY and frames != target):
            return
        shown[0] = now
        speed = (frames - first) / fps / max(now - begun, 1e-9)
        bar.set_postfix_str(f"{speed:.1f} x real time, {resident_bytes() / 2**20:.0f} MiB", refresh=False)
        bar.update(frames - bar.n)

    with bar:
        yield show


def _leave_signals_to_the_first() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Stop:
    """Turns the first SIGINT or SIGTERM into a wish to stop at the next boundary; a second one ends at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        return self.wanted

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self.__exit__()
        _say("finishing the block and saving; once more to stop at once, unsaved")


def _say(line: str) -> None:
    tqdm.write(f"echo-infinity: {line}", file=sys.stderr)
