"""Safetensors written tensor by tensor: no more than one of them is in memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from echo_infinity.checkpoints.entries import INDEX_SUFFIX, WEIGHT_DTYPES, Entries, Entry

SHARD_BYTES = 2 << 30
_NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}


class Progress:
    """Hears what is written; this one does nothing with it."""

    def expect(self, nbytes: int) -> None:
        """So many more bytes will be written."""

    def done(self, nbytes: int) -> None:
        """So many were."""


def write_shards(
    folder: Path,
    stem: str,
    entries: Entries,
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``stem.safetensors``, or shards and ``stem.safetensors.index.json`` where one file would be too large.

    Args:
        folder: there already; the caller renames it into place.
        stem: of the files' names.
        entries: what to write, in this order; read one at a time.
        shard_bytes: most bytes of a file, unless one tensor alone is larger.
        metadata: for each file's header.
        progress: told the bytes to come, then those of each tensor written.

    Returns:
        The files.

    Raises:
        ValueError: a tensor is not what its entry said, or holds NaN or Inf.
    """
    progress = progress or Progress()
    progress.expect(sum(_nbytes(x) for x in entries.values()))
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + _nbytes(entry) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(entry)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, keys in zip(names, shards, strict=True):
        _write_file(folder / name, {key: entries[key] for key in keys}, metadata or {}, progress)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_nbytes(x) for x in entries.values())},
            "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
        }
        names.append(f"{stem}.safetensors{INDEX_SUFFIX}")
        (folder / names[-1]).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _write_file(path: Path, entries: Entries, metadata: Mapping[str, str], progress: Progress) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, entry in entries.items():
        end = offset + _nbytes(entry)
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries.values():
            x = entry.read()
            if tuple(x.shape) != entry.shape or x.dtype != entry.dtype:
                raise ValueError(f"{entry.where} is {x.dtype} {tuple(x.shape)}, not {entry.dtype} {entry.shape}")
            if x.numel() and not all(bound.isfinite() for bound in torch.aminmax(x)):  # NaN is a bound of its like
                raise ValueError(f"{entry.where} holds NaN or Inf")
            file.write(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del x
            progress.done(_nbytes(entry))
        file.flush()
        os.fsync(file.fileno())


def _nbytes(entry: Entry) -> int:
    count = entry.dtype.itemsize
    for n in entry.shape:
        count *= n
    return count
