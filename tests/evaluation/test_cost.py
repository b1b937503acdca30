"""Bytes of state known by hand, and a time a block."""

import pytest
from echo_infinity.evaluation.cost import CostTest, Timing, costs
from echo_infinity.evaluation.journal import Journal


def measured(checkpoint, policy, tmp_path):
    test = CostTest(blocks=5)
    judge, journal, done = Timing(checkpoint, policy, test), Journal(tmp_path / f"{policy}.jsonl", {}), []
    judge.run(journal, done.append)
    judge.run(journal, done.append)  # a second time there is nothing left to do
    assert (len(journal.rows), sum(done)) == (1, 2 * judge.steps())
    (cost,) = costs(journal.rows)
    return cost


def test_state_has_the_bytes_of_ring_memory_window_and_decoder(untrained, tmp_path):
    evolving, sink = (measured(untrained, policy, tmp_path) for policy in ("evolving", "sink"))
    ring = 12 * 16 * 128 * 4  # frames x tokens x width x float32
    assert evolving.cache_bytes == 5 * ring  # K and V of two layers, and the last one's keys before rotation
    assert sink.cache_bytes == 4 * ring
    assert evolving.memory_bytes == 48 * 128 * 4 + 8  # the state, and how often it was written
    assert sink.memory_bytes == 0
    assert evolving.other_bytes == 12 * 8 * 8 * 8 * 4 + 8 * 8 * 8 * 4  # the window's latents, the decoder's features
    assert evolving.blocks == 5
    low, high = evolving.generate[1:]
    assert 0 < low <= evolving.generate[0] <= high
    assert evolving.frames_per_second > 0


def test_no_block_is_refused():
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        CostTest(blocks=0)
