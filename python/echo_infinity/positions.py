"""The unified relative recipe: which temporal id every frame gets. Pure ints in, ints out."""

from __future__ import annotations

from typing import NamedTuple

ABSOLUTE_TABLE_FRAMES = 1024


class Ids(NamedTuple):
    """Temporal ids of one call, each a range of consecutive ids (empty where the tier is absent)."""

    query: range
    local: range
    memory: range
    sink: range
    bulk: bool


def relative_ids(
    start: int,
    frames: int,
    local: int,
    *,
    memory_frames: int,
    sink_frames: int,
    p_max: int,
    frames_per_block: int,
) -> Ids:
    """Give each tier its ids inside ``[0, p_max)``, the same at frame 345,600 as at frame 45.

    Args:
        start: frame number of the call's first frame.
        frames: frames in the call; more than ``frames_per_block`` makes it bulk, which leaves memory out.
        local: local frames cached, the call's own included.
        memory_frames: frame-equivalents of memory read by the call, 0 while there are none.
        sink_frames: sink frames cached.
        p_max: length of the pretrained temporal range.
        frames_per_block: frames of an ordinary call.

    Returns:
        Query ids end at ``min(start + frames - 1, p_max - 1)``, local ids end with them, memory sits left of
        local, sink at 0.

    Source: paper section on unified relative RoPE; docs/method.md section 3.
    """
    last = min(start + frames - 1, p_max - 1)
    local_first = last - max(local, 1) + 1
    bulk = frames > frames_per_block
    reads_memory = memory_frames > 0 and not bulk
    return Ids(
        query=range(last - frames + 1, last + 1),
        local=range(local_first, last + 1) if local else range(last + 1, last + 1),
        memory=range(local_first - memory_frames, local_first) if reads_memory else range(0),
        sink=range(sink_frames),
        bulk=bulk,
    )


def absolute_ids(start: int, frames: int, local: int, *, memory_frames: int, sink_frames: int) -> Ids:
    """Give each frame its own number, as short-video checkpoints were trained.

    Raises:
        ValueError: the call reaches past the absolute table.

    Source: docs/method.md section 3, absolute ids.
    """
    end = start + frames
    if end > ABSOLUTE_TABLE_FRAMES:
        raise ValueError(
            f"absolute ids reach frame {end}, their table ends at {ABSOLUTE_TABLE_FRAMES}: "
            "stop the stream earlier or use relative ids"
        )
    memory_first = max(0, end - local - memory_frames)
    return Ids(
        query=range(start, end),
        local=range(end - local, end),
        memory=range(memory_first, memory_first + memory_frames),
        sink=range(sink_frames),
        bulk=False,
    )


def grid_positions(rows: int, columns: int, grid_rows: int, grid_columns: int) -> tuple[list[float], list[float]]:
    """Place a ``rows x columns`` grid of tokens at the centres of its cells on a ``grid_rows x grid_columns`` frame.

    Returns:
        Row and column of each token in row-major order; whole numbers where the two grids agree.

    Source: docs/method.md section 4, compression ratios.
    """

    def centres(count: int, span: int) -> list[float]:
        cell = span / count
        return [(i + 0.5) * cell - 0.5 for i in range(count)]

    return (
        [r for r in centres(rows, grid_rows) for _ in range(columns)],
        [c for _ in range(rows) for c in centres(columns, grid_columns)],
    )
