"""Full attention: every frame at its own id, and an end that is an error."""

import pytest
from echo_infinity.config import WindowConfig
from echo_infinity.policies import POLICIES
from seen import WINDOWS, assert_attends_to, make_checkpoint, sampler, whole


@pytest.mark.parametrize("window", ["official", "blocks of two"])
def test_sees_every_frame(window, exact_tables):
    assert_attends_to("full", window, lambda w, start, first: whole(*[range(start + w.frames_per_block)] * 2))


def test_stops_with_an_error_instead_of_forgetting():
    checkpoint = make_checkpoint(WindowConfig(sink_frames=0, window_frames=2, frames_per_block=2, p_max=4))
    limit = POLICIES["full"].max_frames(checkpoint.config)
    assert limit == 40
    stream = sampler("full", checkpoint)
    for _ in range(limit // 2):
        stream.next_block()
    with pytest.raises(ValueError, match="holds 40 latent frames and forgets none: stop the stream before frame 40"):
        stream.next_block()


def test_only_full_attention_has_an_end():
    config = make_checkpoint(WINDOWS["official"]).config
    assert [name for name, policy in POLICIES.items() if policy.max_frames(config)] == ["full"]
