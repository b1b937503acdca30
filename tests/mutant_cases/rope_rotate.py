"""Heads that don't fill a thread's share, a batch, and gaps between tokens and heads that nobody may touch."""

import torch
from numerics import assert_no_worse_than

from echo_ext.rope import frame_table, grid_table, rope_rotate, rope_rotate_ref


def run() -> None:
    wide = torch.full((2, 13, 4, 24), float("nan"))
    x = wide[:, :12, :3, :16].normal_()
    tables = frame_table([3, 4], 16), grid_table([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], 16)
    out = rope_rotate(x, *tables, backend="kernel")
    exact = rope_rotate_ref(x.double(), *(t.double() for t in tables))
    assert_no_worse_than(out, rope_rotate_ref(x, *tables), exact)
