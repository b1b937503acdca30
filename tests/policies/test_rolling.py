"""Rolling sink: one block of the stream's start, there and back again, and the window."""

import pytest
from echo_infinity.policies.rolling import there_and_back
from seen import WINDOWS, assert_attends_to, gone_blocks, tiers, whole


@pytest.mark.parametrize("window", WINDOWS)
def test_sees_the_start_of_the_stream_roll_by(window, exact_tables):
    def seen(w, start, first):
        _, local, ids = tiers(w, start)
        gone = gone_blocks(w, start, first)[: w.p_max // w.frames_per_block]
        if not gone:
            return whole(local, ids)
        there = list(range(w.p_max // w.frames_per_block))
        order = there + there[-2:0:-1]
        step = (start - (w.window_frames - w.sink_frames)) // w.frames_per_block
        shown = gone[min(order[step % len(order)], len(gone) - 1)]
        before = ids[0] - w.frames_per_block
        before = before if w.relative else max(0, before)
        return whole(shown, range(before, before + w.frames_per_block)) + whole(local, ids)

    assert_attends_to("rolling", window, seen, blocks=20)


def test_there_and_back_again():
    assert [there_and_back(i, 4) for i in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert [there_and_back(i, 1) for i in range(3)] == [0, 0, 0]
