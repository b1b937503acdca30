"""Where a run keeps its state, and the promise that nothing there is lost in silence."""

from __future__ import annotations

import os
import re
from pathlib import Path

from echo_infinity.state import check_writable


def state_path(output: str | os.PathLike[str] | None) -> Path:
    """Return the state file that belongs to a video: beside it, or in the working folder where there is none."""
    if output is None:
        return Path("echo.state.safetensors")
    output = Path(output)
    stem = re.sub(r"%0?\d*d", "", output.stem).strip("_-. ") or "echo"
    return output.with_name(f"{stem}.state.safetensors")


def numbered(path: str | os.PathLike[str], index: int, count: int) -> Path:
    """Return the path of one of ``count`` streams that were given one path: ``out-0.mp4`` of ``out.mp4``."""
    path = Path(path)
    return path if count == 1 else path.with_name(f"{path.stem}-{index}{path.suffix}")


def hold_places(state: Path, *, keep: Path | None, overwrite: bool) -> None:
    """Check that the state can be written, and that it will replace nothing but what it may.

    Args:
        state: file of the run's state.
        keep: state that the run resumes; it may be replaced.
        overwrite: an older state may be deleted, see :func:`clear_place`.

    Raises:
        FileExistsError: another state is there.
        OSError: the folder can't be written.
    """
    if _holds_another(state, keep) and not overwrite:
        raise FileExistsError(
            f"a saved stream is at {state} already: go on with --resume {state}, give another --save, "
            "or allow --overwrite"
        )
    check_writable(state)


def clear_place(state: Path, *, keep: Path | None) -> None:
    """Delete an older state once its video is replaced; ``keep`` is the one that the run resumes."""
    if _holds_another(state, keep):
        state.unlink()


def _holds_another(state: Path, keep: Path | None) -> bool:
    return state.is_file() and not (keep is not None and state.samefile(keep))
