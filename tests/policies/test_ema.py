"""Sink, averages, window: each frame of the tier is a weighted sum of all frames at its place of a block."""

import pytest
from echo_infinity.policies.ema import DECAY
from seen import WINDOWS, Seen, assert_attends_to, gone_blocks, tiers, whole


@pytest.mark.parametrize("window", WINDOWS)
def test_sees_the_average_of_all_blocks_that_left(window, exact_tables):
    def seen(w, start, first):
        sink, local, ids = tiers(w, start)
        gone, count = gone_blocks(w, start, first), w.frames_per_block
        kept = []
        for i in range(count if gone else 0):
            weights = {gone[0][i]: DECAY ** (len(gone) - 1)}
            weights |= {b[i]: (1 - DECAY) * DECAY ** (len(gone) - 1 - n) for n, b in enumerate(gone) if n}
            assert sum(weights.values()) == pytest.approx(1)
            kept.append(Seen(_first(w, ids, start) + i, weights))
        return sink + kept + whole(local, ids)

    assert_attends_to("ema", window, seen)


def _first(w, ids, start):
    before = ids[0] - w.frames_per_block
    return before if w.relative else max(0, before)
