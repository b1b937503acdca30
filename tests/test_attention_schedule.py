"""Who computes which keys of which tile: every step once, no two parts in one slot, no block idle for long."""

import ctypes
import functools
from collections import defaultdict
from pathlib import Path

import emulated as emulation
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@functools.cache
def library():
    if reason := emulation.why_not():
        pytest.skip(reason)
    lib = ctypes.CDLL(str(emulation.link([(Path(__file__).parent / "host/schedule.cpp", ["-O1"])], [], "schedule.so")))
    lib.piece.restype = ctypes.c_bool
    return lib


def schedule(*shape):
    out = (ctypes.c_int * 5)()
    library().schedule(*shape, ctypes.byref(out))
    return dict(zip(("tiles", "steps", "blocks", "whole", "sharers"), out, strict=True))


def pieces(*shape):
    """(tile, begin, end, slot) of each block, in its order."""
    out, found = (ctypes.c_int * 4)(), []
    for block in range(schedule(*shape)["blocks"]):
        found.append([])
        while library().piece(*shape, block, len(found[-1]), ctypes.byref(out)):
            found[-1].append(tuple(out))
    return found


@settings(max_examples=200, deadline=None)
@given(tiles=st.integers(0, 60), steps=st.integers(1, 70), blocks=st.integers(1, 24))
def test_every_step_is_done_once_and_joined_from_where_it_went(tiles, steps, blocks):
    plan, done, slots = schedule(tiles, steps, blocks), defaultdict(list), {}
    assert plan["blocks"] <= blocks
    for block in pieces(tiles, steps, blocks):
        for tile, begin, end, slot in block:
            assert 0 <= begin < end <= steps
            done[tile] += range(begin, end)
            assert (slot == -1) == (end - begin == steps)
            if slot >= 0:
                assert slot not in slots
                assert slot < 2 * plan["sharers"]
                slots[slot] = tile
    assert sorted(done) == list(range(tiles))
    assert all(sorted(steps_done) == list(range(steps)) for steps_done in done.values())
    for shared in range(tiles - plan["whole"]) if plan["sharers"] else ():
        out = (ctypes.c_int * (blocks + 1))()
        joined = out[: library().slots(tiles, steps, blocks, shared, out)]
        mine = [slot for slot, tile in slots.items() if tile == plan["whole"] + shared]
        assert joined == sorted(mine) if mine else len(joined) == 1


@settings(max_examples=200, deadline=None)
@given(tiles=st.integers(1, 60), steps=st.integers(1, 70), blocks=st.integers(1, 24))
def test_sharing_saves_time_or_does_not_happen(tiles, steps, blocks):
    longest = max(sum(end - begin for _, begin, end, _ in block) for block in pieces(tiles, steps, blocks))
    unshared = -(-tiles // blocks) * steps
    assert longest <= unshared
    assert (longest < unshared) == (schedule(tiles, steps, blocks)["sharers"] > 0)


def test_official_geometry_leaves_no_multiprocessor_idle():
    """444 tiles of 134 steps on 132 multiprocessors: three rounds, and 48 tiles shared by all."""
    assert schedule(444, 134, 132) == {"tiles": 444, "steps": 134, "blocks": 132, "whole": 396, "sharers": 132}
    steps = [sum(end - begin for _, begin, end, _ in block) for block in pieces(444, 134, 132)]
    assert max(steps) - min(steps) <= 1
    assert max(steps) == 451  # of 4 * 134 = 536 unshared
