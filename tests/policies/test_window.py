"""Window only: the last frames, and nothing else ever."""

import pytest
from seen import WINDOWS, assert_attends_to, whole


@pytest.mark.parametrize("window", WINDOWS)
def test_sees_the_last_window_of_frames(window, exact_tables):
    count = WINDOWS[window].window_frames

    def seen(w, start, first):
        end = start + w.frames_per_block
        last = min(end, w.p_max) if w.relative else end
        frames = range(max(0, end - count), end)
        return whole(frames, range(last - len(frames), last))

    assert_attends_to("window", window, seen)
