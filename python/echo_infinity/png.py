"""Write a stream's frames as numbered PNG files."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from .writer import VideoPosition, VideoWriteError, as_frames, io_reason

__all__ = ["PngWriter"]

_DEFAULT_NAME = "frame_%09d.png"
# The signature and the IHDR chunk, after which other chunks may come.
_PNG_HEAD_BYTES = 33


class PngWriter:
    """Write one PNG file a frame, each with the metadata as text; a file is there whole or not at all."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        width: int,
        height: int,
        metadata: Mapping[str, object] | None = None,
        resume: VideoPosition | None = None,
        overwrite: bool = False,
    ) -> None:
        """Open a folder for writing.

        Args:
            path: a folder, made if only its last part is missing, or a pattern such as ``folder/shot_%06d.png``.
            width: pixels.
            height: pixels.
            metadata: text for every file, such as prompt, seed and version.
            resume: go on after this many frames; later files are deleted.
            overwrite: delete frames that are there already.

        Raises:
            ValueError: the pattern doesn't have one number, or the size isn't positive.
            VideoWriteError: the folder can't be written, holds frames already, or misses frames to resume after.
        """
        if width < 1 or height < 1:
            raise ValueError(f"width and height must be >= 1, got {width} x {height}")
        self._path = Path(path)
        pattern = self._path if self._path.suffix.lower() == ".png" else self._path / _DEFAULT_NAME
        parts = re.split(r"%0?(\d*)d", pattern.name)
        if len(parts) != 3:
            raise ValueError(f"{pattern.name} must number the frames once, as in {_DEFAULT_NAME}")
        self._folder, self._name = pattern.parent, pattern.name
        self._match = re.compile(re.escape(parts[0]) + r"(\d+)" + re.escape(parts[2])).fullmatch
        self._width, self._height = width, height
        self._text = b"".join(_text_chunk(key, str(value)) for key, value in (metadata or {}).items())
        self._frames = 0 if resume is None else resume.frames
        self._closed = False
        try:
            self._prepare(resume, overwrite)
        except OSError as error:
            raise VideoWriteError(self._path, io_reason(error, self._folder)) from error
        self._encoder = av.CodecContext.create("png", "w")
        self._encoder.width, self._encoder.height, self._encoder.pix_fmt = width, height, "rgb24"
        self._encoder.time_base = Fraction(1, 1)
        # Several threads would hold back frames.
        self._encoder.thread_count = 1

    def write(self, frames: Any) -> None:
        """Append frames, all of them or, on error, none.

        Args:
            frames: ``(N, height, width, 3)`` RGB, uint8, numpy or torch on the CPU.

        Raises:
            ValueError: another shape, dtype or device, or the writer is closed.
            VideoWriteError: the disk refused; no file of this call is left.
        """
        if self._closed:
            raise ValueError(f"the video writer of {self._path} is closed")
        block = as_frames(frames, self._width, self._height)
        try:
            for index, frame in enumerate(block, self._frames):
                self._write_one(index, frame)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._delete(range(self._frames, self._frames + len(block)))
            if isinstance(error, OSError):
                raise VideoWriteError(self._path, io_reason(error, self._file(self._frames))) from error
            raise
        self._frames += len(block)

    def position(self) -> VideoPosition:
        """Return how many frames are in the folder."""
        return VideoPosition(frames=self._frames)

    def close(self) -> None:
        """Finish; nothing can be written afterwards."""
        self._closed = True

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, index: int) -> Path:
        return self._folder / (self._name % index)

    def _existing(self) -> Iterator[int]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                found = self._match(entry.name)
                if found:
                    yield int(found[1])

    def _prepare(self, resume: VideoPosition | None, overwrite: bool) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise VideoWriteError(self._path, f"{self._folder} is a file, not a folder; change the output path")
        if resume is None:
            self._folder.mkdir(exist_ok=True)
        elif not self._folder.is_dir():
            raise VideoWriteError(self._path, f"resume: the folder {self._folder} is gone")
        present = list(self._existing())
        if resume is None and present and not overwrite:
            raise VideoWriteError(
                self._path,
                f"it holds {len(present)} frames already; resume their stream, choose another folder, "
                "or allow overwriting",
            )
        kept = sum(index < self._frames for index in present)
        if kept != self._frames:
            raise VideoWriteError(
                self._path, f"resume: {self._frames} frames were saved but {kept} of them are left in {self._folder}"
            )
        self._delete(index for index in present if index >= self._frames)
        probe = self._temporary(self._frames)
        probe.write_bytes(b"")
        probe.unlink()

    def _temporary(self, index: int) -> Path:
        return self._folder / f".{self._name % index}.part"

    def _write_one(self, index: int, frame: np.ndarray) -> None:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = index
        packets = self._encoder.encode(picture)
        if len(packets) != 1:
            raise RuntimeError(f"the PNG encoder gave {len(packets)} packets for one frame, expected 1")
        data = bytes(packets[0])
        part = self._temporary(index)
        try:
            part.write_bytes(data[:_PNG_HEAD_BYTES] + self._text + data[_PNG_HEAD_BYTES:])
            # The rename is what keeps a half-written picture from ever having a frame's name.
            part.replace(self._file(index))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _delete(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._file(index).unlink(missing_ok=True)


def _text_chunk(key: str, value: str) -> bytes:
    """Build an iTXt chunk (PNG specification, 11.3.3.4)."""
    keyword = key.encode("latin-1", "replace")
    if not 1 <= len(keyword) <= 79 or b"\0" in keyword:
        raise ValueError(f"metadata key {key!r} must have 1 to 79 characters, none of them zero")
    body = b"iTXt" + keyword + b"\0\0\0\0\0" + value.replace("\0", " ").encode()
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
