"""Write a stream's frames while it runs: mp4, PNG files, or nowhere; a killed run leaves a playable file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .mp4 import Mp4Writer
from .png import PngWriter
from .writer import VideoPosition, VideoWriteError, VideoWriter

__all__ = ["Mp4Writer", "NullWriter", "PngWriter", "VideoPosition", "VideoWriteError", "VideoWriter", "open_writer"]


class NullWriter:
    """Count frames and write nothing."""

    def __init__(self, *, resume: VideoPosition | None = None) -> None:
        """Start at zero frames, or at the saved count."""
        self._frames = 0 if resume is None else resume.frames

    def write(self, frames: Any) -> None:
        """Count frames ``(N, H, W, 3)``."""
        self._frames += len(frames)

    def position(self) -> VideoPosition:
        """Return the count."""
        return VideoPosition(frames=self._frames)

    def close(self) -> None:
        """Finish."""

    def __enter__(self) -> NullWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_writer(
    path: str | os.PathLike[str] | None,
    *,
    width: int,
    height: int,
    fps: int = 16,
    metadata: Mapping[str, object] | None = None,
    resume: VideoPosition | None = None,
    overwrite: bool = False,
) -> VideoWriter:
    """Open the writer that suits the path.

    Args:
        path: ``.mp4`` for a video; a folder, or a name such as ``shot_%06d.png``, for PNG files; None for no video.
        width: pixels.
        height: pixels.
        fps: frames a second.
        metadata: keys and values to store, such as prompt, seed and version.
        resume: the position at which an earlier run stopped.
        overwrite: replace what is there already.

    Returns:
        The writer.

    Raises:
        ValueError: another suffix, or a size that can't be written.
        VideoWriteError: the path can't be written, exists already, or isn't the one to resume.
    """
    if path is None:
        return NullWriter(resume=resume)
    suffix = Path(path).suffix.lower()
    if suffix == ".mp4":
        return Mp4Writer(
            path, width=width, height=height, fps=fps, metadata=metadata, resume=resume, overwrite=overwrite
        )
    if suffix in ("", ".png") or Path(path).is_dir():
        return PngWriter(path, width=width, height=height, metadata=metadata, resume=resume, overwrite=overwrite)
    raise ValueError(f"can't write video {path}: suffix {suffix}, expected .mp4, .png (as shot_%06d.png) or a folder")
