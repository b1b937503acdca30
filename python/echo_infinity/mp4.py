"""Write a stream's frames as H.264 into a fragmented mp4 that is playable at every instant and can be resumed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import av
import numpy as np

from .fmp4 import FRAGMENT_HEAD_BYTES, fragment, parse_fragment, parse_init
from .h264 import H264Encoder
from .writer import VideoPosition, VideoWriteError, as_frames, io_reason

__all__ = ["Mp4Writer"]

# Bounds the memory of one write() call, however many frames it is given.
_FRAMES_A_FRAGMENT = 64
# Level 6.2 of H.264 ends here.
_MAX_SIDE = 16384
# Pixels above which a second thread saves more than it costs to wake.
_LARGE_PICTURE = 256 * 256


class Mp4Writer:
    """Write H.264 into a fragmented mp4: one init segment, then a fragment a call of :meth:`write`.

    The encoder holds nothing back, so the file may end after any fragment, and a resumed encoder starts the next one
    with a keyframe. Memory doesn't grow with the video, and a day's timestamps fit (64 bit).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        width: int,
        height: int,
        fps: int = 16,
        metadata: Mapping[str, object] | None = None,
        resume: VideoPosition | None = None,
        overwrite: bool = False,
        preset: str = "veryfast",
        crf: int = 18,
        threads: int | None = None,
    ) -> None:
        """Start a new file, or go on with one.

        Args:
            path: the mp4.
            width: pixels, even.
            height: pixels, even.
            fps: frames a second.
            metadata: keys and values for the file, such as prompt, seed and version; a resumed file keeps its own.
            resume: cut the file to this position and append.
            overwrite: replace a file that is there already.
            preset: x264's speed preset; a resume needs the one the file was started with.
            crf: x264's constant quality, lower is better.
            threads: encoder threads; None for one, or up to four for large pictures.

        Raises:
            ValueError: a size or rate that can't be encoded.
            VideoWriteError: the file can't be written, exists already, or isn't the one to resume; it is left as it is.
        """
        for name, size in (("width", width), ("height", height)):
            if not 2 <= size <= _MAX_SIDE or size % 2:
                raise ValueError(
                    f"{name} must be even and between 2 and {_MAX_SIDE} for H.264, got {size}: "
                    "crop or pad the frames, or write PNG files"
                )
        if fps < 1:
            raise ValueError(f"fps must be >= 1, got {fps}")
        if threads is None:
            threads = min(4, os.cpu_count() or 1) if width * height >= _LARGE_PICTURE else 1
        self._path = Path(path)
        self._width, self._height = width, height
        self._settings: dict[str, Any] = {
            "width": width, "height": height, "fps": fps, "metadata": metadata or {},
            "preset": preset, "crf": crf, "threads": threads,
        }  # fmt: skip
        self._encoder: H264Encoder | None = self._start_encoder()
        init = self._encoder.init
        self._ticks = parse_init(init).duration
        try:
            if resume is None:
                self._position = self._create(init, overwrite)
                self._sequence = 0
            else:
                self._position = resume
                self._sequence = self._reopen(init, resume)
        except OSError as error:
            raise VideoWriteError(self._path, io_reason(error, self._path)) from error

    def write(self, frames: Any) -> None:
        """Append frames, all of them or, on error, none; after an error the same call may be tried again.

        Args:
            frames: ``(N, height, width, 3)`` RGB, uint8, numpy or torch on the CPU.

        Raises:
            ValueError: another shape, dtype or device, or the writer is closed.
            VideoWriteError: the disk refused; the file ends where it did before the call.
        """
        if self._file.closed:
            raise ValueError(f"the video writer of {self._path} is closed")
        block = as_frames(frames, self._width, self._height)
        position, sequence = self._position, self._sequence
        try:
            for first in range(0, len(block), _FRAMES_A_FRAGMENT):
                sequence += 1
                position = self._append(block[first : first + _FRAMES_A_FRAGMENT], position, sequence)
        except BaseException as error:
            self._roll_back()
            if isinstance(error, OSError):
                raise VideoWriteError(self._path, io_reason(error, self._path)) from error
            raise
        self._position, self._sequence = position, sequence

    def position(self) -> VideoPosition:
        """Return the point up to which everything written is on disk, also after a power cut.

        Raises:
            VideoWriteError: the disk couldn't take what was written.
        """
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise VideoWriteError(self._path, io_reason(error, self._path)) from error
        return self._position

    def close(self) -> None:
        """Finish; nothing can be written afterwards."""
        self._file.close()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_encoder(self) -> H264Encoder:
        try:
            return H264Encoder(**self._settings)
        except av.FFmpegError as error:
            raise VideoWriteError(
                self._path, f"no H.264 encoder for these settings ({error}); write PNG files or install PyAV's wheel"
            ) from error

    def _create(self, init: bytes, overwrite: bool) -> VideoPosition:
        self._file = self._path.open("wb+" if overwrite else "xb+", buffering=0)
        try:
            self._write_at(0, init)
        except BaseException:
            self._file.close()
            if self._path.is_file():
                self._path.unlink()
            raise
        return VideoPosition(frames=0, bytes=len(init))

    def _reopen(self, init: bytes, resume: VideoPosition) -> int:
        """Check that the file is the saved one, cut it to the position, and return its last fragment's number."""
        if not self._path.is_file():
            raise VideoWriteError(self._path, "resume: the file is gone; put it back or start a new video")
        self._file = self._path.open("rb+", buffering=0)
        try:
            sequence = self._check(init, resume)
            self._file.truncate(resume.bytes)
        except BaseException:
            self._file.close()
            raise
        return sequence

    def _check(self, init: bytes, resume: VideoPosition) -> int:
        size = os.fstat(self._file.fileno()).st_size
        if not resume.bytes:
            self._refuse("the saved stream wrote no mp4; start a new file")
        if size < resume.bytes:
            self._refuse(f"the file has {size} bytes, the saved stream had written {resume.bytes}")
        ours = parse_init(init)
        try:
            theirs = parse_init(self._read_at(0, self._init_bytes()))
        except ValueError as error:
            self._refuse(str(error))
        if (ours.width, ours.height) != (theirs.width, theirs.height):
            self._refuse(
                f"the file is {theirs.width} x {theirs.height}, the stream gives {ours.width} x {ours.height}; "
                "start a new file"
            )
        if ours.fps != theirs.fps:
            self._refuse(f"the file has {theirs.fps:g} frames a second, the stream {ours.fps:g}; start a new file")
        if ours != theirs:
            self._refuse("the file was encoded with other settings or another x264; use those or start a new file")
        return self._check_last_fragment(resume)

    def _check_last_fragment(self, resume: VideoPosition) -> int:
        if not resume.frames:
            frames, end, sequence = 0, self._init_bytes(), 0
        else:
            try:
                head = parse_fragment(self._read_at(resume.last_fragment, FRAGMENT_HEAD_BYTES))
            except ValueError as error:
                self._refuse(f"at byte {resume.last_fragment}: {error}")
            data = resume.last_fragment + head.moof_bytes
            frames = head.start // self._ticks + head.count
            end = data + int.from_bytes(self._read_at(data, 4), "big")
            sequence = head.sequence
        if (frames, end) != (resume.frames, resume.bytes):
            self._refuse(
                f"the file has {frames} frames at byte {end}, "
                f"the saved stream had {resume.frames} frames at byte {resume.bytes}"
            )
        return sequence

    def _refuse(self, reason: str) -> NoReturn:
        raise VideoWriteError(self._path, f"resume: {reason}")

    def _init_bytes(self) -> int:
        """Return where the init segment (ftyp, moov) ends."""
        ftyp = int.from_bytes(self._read_at(0, 4), "big")
        return ftyp + int.from_bytes(self._read_at(ftyp, 4), "big")

    def _append(self, block: np.ndarray, position: VideoPosition, sequence: int) -> VideoPosition:
        if self._encoder is None:
            self._encoder = self._start_encoder()
        data = fragment(sequence, position.frames * self._ticks, [self._encoder.encode(frame) for frame in block])
        # Until it is whole the fragment is a box that players skip, so a killed run never leaves half a picture.
        self._write_at(position.bytes, data[:4] + b"free" + data[8:])
        self._write_at(position.bytes + 4, data[4:8])
        return VideoPosition(position.frames + len(block), position.bytes + len(data), position.bytes)

    def _roll_back(self) -> None:
        # What the encoder has seen isn't in the file, so the next frame must not refer to it.
        self._encoder = None
        with contextlib.suppress(OSError):
            self._file.truncate(self._position.bytes)

    def _write_at(self, offset: int, data: bytes) -> None:
        self._file.seek(offset)
        view = memoryview(data)
        while view:
            # A disk about to be full takes a part first and says why at the next call.
            view = view[self._file.write(view) :]

    def _read_at(self, offset: int, count: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(count)
