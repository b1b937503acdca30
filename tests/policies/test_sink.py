"""Sink and window: the first frames for ever and the last ones."""

import pytest
from seen import WINDOWS, assert_attends_to, tiers, whole


@pytest.mark.parametrize("window", WINDOWS)
def test_sees_sink_and_window(window, exact_tables):
    def seen(w, start, first):
        sink, local, ids = tiers(w, start)
        return sink + whole(local, ids)

    assert_attends_to("sink", window, seen)
