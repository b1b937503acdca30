"""Sink, pooled frames, window: the last frames that left, four tokens made one."""

import pytest
from echo_infinity.policies import POLICIES
from seen import WINDOWS, Seen, assert_attends_to, gone_blocks, make_checkpoint, tiers, whole


@pytest.mark.parametrize("window", WINDOWS)
def test_sees_the_last_frames_that_left_pooled(window, exact_tables):
    def seen(w, start, first):
        sink, local, ids = tiers(w, start)
        gone = [f for block in gone_blocks(w, start, first) for f in block][-4 * w.frames_per_block :]
        if not gone:
            return sink + whole(local, ids)
        end = ids[0] if w.relative else max(w.frames_per_block, ids[0])
        at = [end - 0.5 - (n + 0.5) / 4 for n in reversed(range(len(gone)))]
        return sink + [Seen(i, {f: 1.0}, pooled=True) for f, i in zip(gone, at, strict=True)] + whole(local, ids)

    assert_attends_to("pooled", window, seen)


def test_a_frame_that_has_no_whole_cells_is_refused():
    config = make_checkpoint().config
    odd = type(config)(model=config.model, latent_rows=6, latent_columns=4)
    with pytest.raises(ValueError, match="cells of 2 x 2 tokens, a frame has 3 x 2"):
        POLICIES["pooled"].configure(odd)
