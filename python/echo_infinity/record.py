"""Run a stream into a video: decode and write in a second thread, save on time, stop at a boundary, lose nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from echo_infinity.batch import StreamBatch
from echo_infinity.state import SavedVideo
from echo_infinity.stream import Stream
from echo_infinity.video import VideoWriteError, VideoWriter


def frames_ahead(stream: Stream, frames: int) -> int:
    """Return by how many frames a video will be ahead of its stream once what waits is decoded.

    Args:
        stream: generates.
        frames: that the video has, those decoded and not written yet included.
    """
    return frames + stream.undecoded - stream.frames


class Recorder:
    """Drive a stream until its video is long enough.

    Decoding, hashing and writing a block overlap with generating the next one. Frames that could not be written, or
    lie past the video's end, are kept (``rest``) and saved with the stream: a resumed run writes them first.

    Args:
        stream: with ``output_type`` "pixels".
        writer: opened at the stream's saved position, if it has one.
        path: of the video, for the saved state; None where frames are only counted.
        target: frames that the video is to have; None for endless.
        save: file for the stream's state.
        autosave: seconds between saves at block boundaries; 0 saves at each, None never.
        hashes: file that gets a line "block sha256" for each raw block.
        on_block: called after each block with the number of frames in the video.
        on_trouble: called with a line of text when an autosave fails; the run goes on.
    """

    def __init__(
        self,
        stream: Stream,
        writer: VideoWriter,
        *,
        path: str | None = None,
        target: int | None = None,
        save: Path | None = None,
        autosave: float | None = None,
        hashes: Path | None = None,
        on_block: Callable[[int], None] = lambda frames: None,
        on_trouble: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.stream, self.writer, self.path, self.target = stream, writer, path, target
        self.state, self.autosave, self.hashes = save, autosave, hashes
        self.on_block, self.on_trouble = on_block, on_trouble
        self.written = writer.position().frames
        height, width = stream.pipe.size
        self.rest = torch.zeros(0, height, width, 3, dtype=torch.uint8) if stream.video is None else stream.video.rest
        self.saved: Path | None = None  # where the last good state of this run is
        self.resumed: Path | None = stream.resumed  # and that of the run before
        self._error: OSError | VideoWriteError | None = None
        waiting = stream.waiting
        self._waiting = deque(zip(waiting, range(stream.block - len(waiting), stream.block), strict=True))
        self.offset = frames_ahead(stream, self.written + len(self.rest))
        self._saved_at = 0.0

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Generate until the target is reached or ``stop()``, asked at every block boundary, says so.

        Returns:
            Whether the target was reached.

        Raises:
            NonFiniteError: NaN or Inf; no state is saved any more.
            VideoWriteError: the disk refused; the stream can still be saved, with the frames that aren't written.
            OSError: the same, from the file of hashes.
            OutOfMemoryError: torch's; the stream can still be saved, with the blocks that could not be decoded.
        """
        return _drive([self], lambda: [self.stream.next_latents()], stop)

    def begin(self) -> None:
        """Write what a saved stream left unwritten or undecoded; save for the first time."""
        self._flush()
        self.take_all()
        self.save_on_time()

    @property
    def full(self) -> bool:
        """Whether enough is generated."""
        return self.target is not None and self.offset + self.stream.frames >= self.target

    @property
    def failure(self) -> OSError | VideoWriteError | None:
        """Why nothing can be written any more."""
        return self._error

    def put(self, latents: Tensor) -> None:
        """Take the block that the stream has just made."""
        self._waiting.append((latents, self.stream.block - 1))

    def take_next(self) -> None:
        """Decode and write the block that waits longest; errors of writing are kept as :attr:`failure`."""
        latents, block = self._waiting[0]
        frames = self.stream.decode(latents)
        self._waiting.popleft()
        self.rest = torch.cat([self.rest, frames]) if len(self.rest) else frames
        if self.hashes is not None:
            line = f"{block} {hashlib.sha256(frames.numpy().data).hexdigest()}\n"
            try:
                append_line(self.hashes, line)
            except OSError as error:
                self._error = self._error or error
        self._flush()

    def take_all(self) -> None:
        """Decode and write all that waits."""
        while self._waiting:
            self.take_next()

    def save_on_time(self) -> None:
        """Save, where saves are asked for, and go on if it fails; to be called when nothing waits."""
        if self.autosave is None:
            return
        try:
            if self._error is None:
                self.save()
        except (OSError, VideoWriteError) as error:
            kept = f"the state saved before is still at {self.saved}" if self.saved else "no state is saved yet"
            self.on_trouble(f"could not save the stream: {error}; {kept}; going on")
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return self.autosave is not None and time.monotonic() - self._saved_at >= self.autosave

    def save(self, path: Path | None = None) -> Path:
        """Save the stream and where its video stands, to ``path`` or the recorder's own file; return the path.

        Raises:
            OSError: the disk refused; what was there before still is.
            VideoWriteError: the video isn't safely on disk, so a state that counts on it isn't written.
            NonFiniteError: as :meth:`Stream.save`.
            ValueError: no path at all.
        """
        path = path or self.state
        if path is None:
            raise ValueError("nowhere to save to: give a path")
        self.stream.save(path, video=SavedVideo(self.writer.position(), self.path, self.target, self.rest))
        self.saved = path
        return path

    def _flush(self) -> None:
        """Write what is decoded, up to the target; an error is kept for the thread that runs the stream."""
        count = len(self.rest) if self.target is None else min(len(self.rest), self.target - self.written)
        if count <= 0 or self._error is not None:
            return
        try:
            self.writer.write(self.rest[:count])
        except VideoWriteError as error:
            self._error = error
            return
        self.written += count
        self.rest = self.rest[count:]


def record_batch(batch: StreamBatch, recorders: Sequence[Recorder], stop: Callable[[], bool] = lambda: False) -> bool:
    """Run streams in step, each into its video, until all targets are reached; as :meth:`Recorder.run`.

    Args:
        batch: the streams.
        recorders: one a stream.
        stop: asked at every block boundary.

    Returns:
        Whether the targets were reached.

    Raises:
        ValueError: the videos would be full at different blocks.
    """
    if len({None if r.target is None else r.target - r.offset for r in recorders}) > 1:
        raise ValueError("the videos would be full at different blocks of their streams: record them one at a time")
    return _drive(recorders, batch.next_latents, stop)


def _drive(recorders: Sequence[Recorder], generate: Callable[[], list[Tensor]], stop: Callable[[], bool]) -> bool:
    try:
        return _overlap(recorders, generate, stop)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        for recorder in recorders:  # alone now: there may be room to decode what is generated before it is saved
            with contextlib.suppress(torch.OutOfMemoryError):
                recorder.take_all()
        raise


def _overlap(recorders: Sequence[Recorder], generate: Callable[[], list[Tensor]], stop: Callable[[], bool]) -> bool:
    """Generate a block of each while the one before is decoded and written."""
    for recorder in recorders:
        recorder.begin()
    jobs: list[Future[None]] = []

    def wait() -> None:
        for job, recorder in zip(jobs, recorders, strict=bool(jobs)):
            job.result()
            recorder.on_block(recorder.written)

    with ThreadPoolExecutor(1) as worker:
        done = False
        while not any(r.failure for r in recorders) and not (done := all(r.full for r in recorders)) and not stop():
            made = generate()
            for recorder, latents in zip(recorders, made, strict=True):
                recorder.put(latents)
            wait()
            jobs = [worker.submit(recorder.take_next) for recorder in recorders]
            if any(recorder.due for recorder in recorders):
                for job in jobs:
                    job.result()
                for recorder in recorders:  # all at one block, or they could not go on together
                    recorder.save_on_time()
        wait()
    if failures := [recorder.failure for recorder in recorders if recorder.failure is not None]:
        raise failures[0]
    return done


def save_somewhere(recorder: Recorder, places: list[Path]) -> tuple[Path | None, list[str]]:
    """Save a stopped stream to the first place that takes it.

    Args:
        recorder: after :meth:`Recorder.run`.
        places: files, the best first.

    Returns:
        The file, or None, and why the places before it did not do.
    """
    if not places:
        return None, []
    try:
        return recorder.save(places[0]), []
    except (RuntimeError, ValueError) as error:  # the same everywhere: NaN, a lost process or device, the video
        return None, [str(error)]
    except OSError as error:
        saved, reasons = save_somewhere(recorder, places[1:])
        return saved, [f"{places[0]}: {error.strerror or error}", *reasons]


def append_line(path: Path, line: str) -> None:
    """Append a line in one system call, so that a killed process leaves it whole or absent."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def resident_bytes() -> int:
    """Return the process's memory; where the system doesn't tell, the most it ever had."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
