"""Hashes of what files hold; those of large files are remembered until the file is touched."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

_LARGE = 1 << 20  # bytes from which remembering pays
_PIECE = 1 << 22


def content_hash(path: Path, memo: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: the file.
        memo: folder where the hash of a large file is kept, by the file's place, size, time and inode.

    Raises:
        OSError: the file can't be read. A memo that can't be read or written costs time and nothing else.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode()).hexdigest()
    note = memo / f"{key}.sha256"
    if stat.st_size >= _LARGE:
        with contextlib.suppress(OSError, ValueError):
            return bytes.fromhex(note.read_text()).hex()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    if stat.st_size >= _LARGE:
        with contextlib.suppress(OSError):
            memo.mkdir(parents=True, exist_ok=True)
            temporary = memo / f".{key}.{os.getpid()}.part"
            temporary.write_text(digest.hexdigest())
            temporary.replace(note)
    return digest.hexdigest()
