"""``echo-infinity generate``: run streams into their videos, and lose nothing on the way out."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from echo_infinity.commands import UserError
from echo_infinity.commands.places import numbered
from echo_infinity.commands.request import Request, check_options, load, prepare
from echo_infinity.finite import NonFiniteError
from echo_infinity.parallel import ProcessesError, join_ranks, lead, leave_ranks
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.record import Recorder, record_batch, resident_bytes, save_somewhere
from echo_infinity.state import SavedStream, read_state
from echo_infinity.video import VideoWriteError

_LOWER = (
    "to take less, add --text-device cpu, --decoder-dtype bfloat16, --kv fp8 or --weights fp8; "
    "'echo-infinity plan --gpu 24GB' says what fits"
)
_REFUSALS = (ValueError, OSError, ImportError, VideoWriteError)
_EVERY = 0.2  # seconds between refreshes of the progress bar


def run(args: argparse.Namespace) -> int:
    """Generate as the options say and return the exit code: 0 done, 130 interrupted, 1 a failure on the way.

    Under torchrun all processes share the work, and the first one does the rest.

    Raises:
        UserError: the request can't be served; nothing was generated.
    """
    ranks = join_ranks()
    try:
        saved = [read_state(path) for path in args.resume or []]
        check_options(args, saved)
        pipe = load(args, saved, ranks)
        if ranks.rank:
            saved.clear()
            _leave_signals_to_the_first()
        return lead(pipe, lambda: _generate(args, _open(args, pipe, saved))) or 0
    except (*_REFUSALS, torch.OutOfMemoryError) as error:
        reason = f"{_no_room(error)}; {_LOWER}" if isinstance(error, torch.OutOfMemoryError) else str(error)
        if ranks.rank:
            _say(f"process {ranks.rank}: {reason}")
            return 2
        raise UserError(reason) from error
    finally:
        leave_ranks()


def _open(args: argparse.Namespace, pipe: EchoPipeline, saved: list[SavedStream]) -> Request:
    request = prepare(args, pipe, saved)
    saved.clear()  # the streams have copies of their own: a long run must not hold the files' as well
    return request


def _generate(args: argparse.Namespace, request: Request) -> int:
    jobs, begun = request.jobs, time.monotonic()
    first, fps = jobs[0].writer.position().frames, jobs[0].stream.pipe.fps
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(job.writer)
            stack.enter_context(job.stream)
        show = stack.enter_context(_progress(args.quiet, jobs[0].target, first, fps))
        stop = stack.enter_context(_Stop())
        recorders = [
            Recorder(
                job.stream,
                job.writer,
                path=job.output,
                target=job.target,
                save=job.state,
                autosave=args.autosave,
                hashes=job.hashes,
                on_block=show if job is jobs[-1] else lambda frames: None,
                on_trouble=_say,
            )
            for job in jobs
        ]
        try:
            batch = request.batch
            done = recorders[0].run(stop) if batch is None else record_batch(batch, recorders, stop)
        except torch.OutOfMemoryError as error:
            code = _failed(args, recorders, RuntimeError(_no_room(error)))
            _say(_LOWER if batch is None else f"{_LOWER}; or ask for fewer streams at once")
            return code
        except (RuntimeError, ValueError, OSError) as error:
            return _failed(args, recorders, error)
        if not done:
            return _interrupted(args, recorders)
        if args.save is not None or args.autosave is not None or args.resume:
            found = [save_somewhere(recorder, [recorder.state] if recorder.state else []) for recorder in recorders]
            if lost := [reasons[-1] for kept, reasons in found if kept is None]:
                _say(f"the video is complete, but the stream could not be saved: {'; '.join(lost)}")
                return 1
    seconds = time.monotonic() - begun
    for recorder in recorders:
        speed = (recorder.written - first) / fps / seconds
        tqdm.write(
            f"{recorder.path or 'no video'}: {recorder.written} frames, {recorder.written / fps:.2f} s; "
            f"generated in {seconds:.1f} s, {speed:.1f} x real time"
        )
    return 0


def _no_room(error: torch.OutOfMemoryError) -> str:
    return f"out of memory: {str(error).splitlines()[0]}"


def _interrupted(args: argparse.Namespace, recorders: Sequence[Recorder]) -> int:
    _say(f"stopped after {recorders[0].written} frames")
    _save_and_tell(args, recorders)
    return 130


def _failed(args: argparse.Namespace, recorders: Sequence[Recorder], error: Exception) -> int:
    _say(f"error: {error}")
    for recorder in recorders:
        if recorder.path is not None:
            _say(f"the video so far is playable: {recorder.path}, {recorder.written} frames")
    if isinstance(error, NonFiniteError | ProcessesError):
        _tell_last_good(args, recorders)
    else:
        _save_and_tell(args, recorders)
    return 1


def _save_and_tell(args: argparse.Namespace, recorders: Sequence[Recorder]) -> None:
    states = [_save(recorder, (i, len(recorders))) for i, recorder in enumerate(recorders)]
    kept = [state for state in states if state is not None]
    if kept:
        _say(f"the stream{'s are' if len(kept) > 1 else ' is'} saved; go on with:\n  {_resume_command(args, kept)}")
    if lost := [recorder for recorder, state in zip(recorders, states, strict=True) if state is None]:
        _tell_last_good(args, lost)


def _save(recorder: Recorder, place: tuple[int, int]) -> Path | None:
    name = numbered(Path(recorder.state or "echo.state.safetensors").name, *place)
    spare = [Path(folder) / f"{os.getpid()}-{name}" for folder in (tempfile.gettempdir(), Path.home(), Path.cwd())]
    saved, reasons = save_somewhere(recorder, [*([recorder.state] if recorder.state else []), *spare])
    for reason in reasons:
        _say(f"could not save the stream: {reason}")
    return saved


def _tell_last_good(args: argparse.Namespace, recorders: Sequence[Recorder]) -> None:
    last = [recorder.saved or recorder.resumed for recorder in recorders]
    if states := [Path(state) for state in last if state is not None]:
        _say(f"the last good state is kept; go on from it with:\n  {_resume_command(args, states)}")
    else:
        _say("no state was saved before; --autosave SECONDS would keep one")


def _resume_command(args: argparse.Namespace, states: Sequence[Path]) -> str:
    words = ["echo-infinity", "generate", *(word for state in states for word in ("--resume", str(state)))]
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
