"""What every video writer shares: the position to resume at, the error, the checks of frames and of the disk."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

__all__ = ["VideoPosition", "VideoWriteError", "VideoWriter", "as_frames", "io_reason"]


@dataclasses.dataclass(frozen=True)
class VideoPosition:
    """A point at which everything written so far is on disk, and where a later writer can go on.

    Attributes:
        frames: frames in the video.
        bytes: length of the mp4 that holds exactly these frames; 0 for PNG files and for no video.
        last_fragment: offset of the mp4's last fragment, by which a resume checks the file; 0 without one.
    """

    frames: int = 0
    bytes: int = 0
    last_fragment: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the position as a dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> VideoPosition:
        """Rebuild a position from :meth:`to_dict`.

        Args:
            saved: the dict, perhaps read back from JSON.

        Returns:
            The position.

        Raises:
            ValueError: keys are missing or unknown, or a value is no integer >= 0.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(saved) != sorted(names):
            raise ValueError(f"a saved video position has the keys {names}, got {sorted(saved)}")
        for name in names:
            if type(saved[name]) is not int or saved[name] < 0:
                raise ValueError(f"saved video position: {name} must be an integer >= 0, got {saved[name]!r}")
        return cls(**saved)


class VideoWriteError(RuntimeError):
    """The video can't be written or resumed; what was written before stays playable.

    Attributes:
        path: the video.
        reason: why, and what to change.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"can't write video {os.fspath(path)}: {reason}")
        self.path = Path(path)
        self.reason = reason


class VideoWriter(Protocol):
    """Where a stream's frames go."""

    def write(self, frames: Any) -> None:
        """Append frames ``(N, H, W, 3)``, RGB uint8, numpy or torch on the CPU: all of them or, on error, none."""

    def position(self) -> VideoPosition:
        """Return the point up to which everything written is on disk."""

    def close(self) -> None:
        """Finish; nothing can be written afterwards."""

    def __enter__(self) -> VideoWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def as_frames(frames: Any, width: int, height: int) -> np.ndarray:
    """Check a block of frames.

    Args:
        frames: ``(N, height, width, 3)`` RGB, uint8, numpy or torch on the CPU.
        width: pixels of the video.
        height: pixels of the video.

    Returns:
        The same memory as a numpy array.

    Raises:
        ValueError: another device, dtype or shape.
    """
    device = getattr(getattr(frames, "device", None), "type", "cpu")
    if device != "cpu":
        raise ValueError(f"frames are on device {device}, expected the CPU: call .cpu() first")
    array = np.asarray(frames)
    if array.dtype != np.uint8:
        raise ValueError(f"frames have dtype {array.dtype}, expected uint8 (0 to 255)")
    if array.ndim != 4 or array.shape[1:] != (height, width, 3):
        raise ValueError(f"frames have shape {array.shape}, expected (N, {height}, {width}, 3)")
    return array


def io_reason(error: OSError, path: Path) -> str:
    """Say what went wrong on the disk and what to change."""
    if isinstance(error, FileNotFoundError):
        return f"the folder {path.parent} doesn't exist; create it or change the output path"
    if isinstance(error, FileExistsError):
        return "it exists already; resume its stream, choose another name, or allow overwriting"
    if isinstance(error, IsADirectoryError):
        return "this is a folder; give the name of a file in it"
    if isinstance(error, NotADirectoryError):
        return f"{path.parent} is a file, not a folder; change the output path"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"no permission to write here ({error.strerror}); choose a folder you can write to"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return f"the disk is full ({error.strerror}); free some space and resume, the video so far is playable"
    if error.errno == errno.EFBIG:
        return f"the file reached the largest size allowed ({error.strerror}); the video so far is playable"
    return error.strerror or str(error)
