"""The file that a running stream is saved in: one safetensors file, replaced at once, checked when it is read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from echo_ext import build_info
from echo_infinity.video import VideoPosition

FORMAT = 1
_META, _SUM = "echo_stream", "crc32"


class ResumeWarning(UserWarning):
    """A stream goes on, but not bit for bit as it would have: something differs from when it was saved."""


@dataclass(frozen=True)
class SavedVideo:
    """Where a stream's video stopped.

    Args:
        position: up to where the video is on disk.
        path: of the video; None where frames were only counted.
        target: frames that the video was to have; None for endless.
        rest: ``(N, H, W, 3)`` uint8, generated frames that are not in the video.
    """

    position: VideoPosition
    path: str | None
    target: int | None
    rest: Tensor

    def meta(self) -> dict[str, Any]:
        """Return all but the frames as JSON values."""
        return {"position": self.position.to_dict(), "path": self.path, "target": self.target}


@dataclass(frozen=True)
class SavedStream:
    """What a state file holds: the settings as JSON values, the tensors by name."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def video(self) -> SavedVideo | None:
        """The video that the stream was written to, if it was."""
        saved = self.meta["video"]
        if saved is None:
            return None
        position = VideoPosition.from_dict(saved["position"])
        return SavedVideo(position, saved["path"], saved["target"], self.tensors["video.rest"])


def write_state(path: str | os.PathLike[str], meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a state file; ``path`` holds the old state or the new one at every instant, also after a power cut.

    Args:
        path: an existing file is replaced.
        meta: JSON values.
        tensors: by name; the caller's are left alone.

    Raises:
        OSError: the disk refused; the old file is still there.
    """
    path = Path(path)
    text = json.dumps({"format": FORMAT, **meta})
    own = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    temporary = _temporary(path)
    try:
        save_file(own, temporary, metadata={_META: text, _SUM: _checksum(text, own)})
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_state(path: str | os.PathLike[str]) -> SavedStream:
    """Read a state file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: corrupt, truncated, not a saved stream, or written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no saved stream at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}; resume from another saved state") from error
    if _META not in metadata or _SUM not in metadata:
        raise ValueError(f"{path} is a safetensors file but no saved stream: it holds {_some(tensors)}")
    if metadata[_SUM] != _checksum(metadata[_META], tensors):
        raise ValueError(f"{path} is corrupt: its checksum doesn't match; resume from another saved state")
    meta = json.loads(metadata[_META])
    if meta["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {meta['format']}, this version reads up to {FORMAT}: upgrade echo-infinity to resume it"
        )
    return SavedStream(path, meta, tensors)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError, with the reason, if a state could not be written to ``path``."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"can't save the stream to {path}: it is a folder; give a file's name")
    temporary = _temporary(path)
    try:
        temporary.write_bytes(b"")
        temporary.unlink()
    except OSError as error:
        raise type(error)(f"can't save the stream to {path}: {error.strerror or error}") from error


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a bit-exact continuation needs beside weights and configuration."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kernels = build_info()["cpu"]["bfloat16"].partition(":")[0]  # the best instruction set, or "PyTorch"
        kind = f"{torch.backends.cpu.get_cpu_capability()}, kernels {kernels}"
    return {
        "torch": torch.__version__,
        "device": f"{device.type} {kind}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def check_model(saved: SavedStream, config: str, fingerprint: str) -> None:
    """Refuse a state of another model.

    Args:
        saved: the state.
        config: the model's configuration as JSON.
        fingerprint: the model's.

    Raises:
        ValueError: names each setting that differs, or says that the weights do.
    """
    theirs, ours = _leaves(saved.meta["config"]), _leaves(json.loads(config))
    if theirs != ours:
        names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        rows = ", ".join(f"{name} (saved {theirs.get(name)}, model {ours.get(name)})" for name in names)
        raise ValueError(f"{saved.path} was saved with another configuration: {rows}; load the model it was made with")
    if saved.meta["fingerprint"] != fingerprint:
        raise ValueError(
            f"{saved.path} was saved with other weights (fingerprint {saved.meta['fingerprint']}, this model's "
            f"{fingerprint}); load the model it was made with"
        )


def warn_differences(saved: SavedStream, now: Mapping[str, Any]) -> None:
    """Warn, naming them, of differences that make the continuation differ in its last bits."""
    then = {"processes": 1, **saved.meta["environment"]}
    rows = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if rows:
        warnings.warn(f"the resumed stream may differ in its last bits: {'; '.join(rows)}", ResumeWarning, stacklevel=4)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _leaves(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested JSON objects to dotted names."""
    if not isinstance(data, dict):
        return {prefix: data}
    return {k: v for name, x in data.items() for k, v in _leaves(x, f"{prefix}.{name}" if prefix else name).items()}


def _some(names: Mapping[str, Any]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (" ..." if len(names) > 3 else "") if first else "nothing"
