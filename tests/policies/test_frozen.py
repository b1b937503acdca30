"""The memory at its learned start: the same keys and values in every call once the window has been full."""

import pytest
import torch
from numerics import assert_no_worse_than, assert_same_bits
from plain import PlainKV, read
from seen import LEVELS, WINDOWS, make_checkpoint, run_calls, sampler


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_sees_the_learned_start(window, exact_tables):
    checkpoint = make_checkpoint(WINDOWS[window])
    stream, model = sampler("frozen", checkpoint), checkpoint.model
    config, geometry, frames = stream.generator.config, stream.generator.geometry, WINDOWS[window].frames_per_block
    levels = [model.condition(torch.full((1, 1), t)) for t in LEVELS]
    inputs = [[torch.randn(1, frames, 2, 4, 4, dtype=torch.float64) for _ in LEVELS] for _ in range(9)]
    flows = iter(run_calls(model, stream.cache, stream.memory, geometry, stream.text, levels, inputs))
    plain, start = PlainKV(config), [read(checkpoint.memory, checkpoint.memory.query_init, 2)] * config.model.layers
    for block, calls in enumerate(inputs):
        for i, x in enumerate(calls):
            full = block * frames - (i == 0) * frames >= WINDOWS[window].window_frames
            exact = model(
                x, levels[i], stream.text, plain, geometry.call(block * frames, frames), start if full else None
            )
            assert_no_worse_than(next(flows), exact, exact)
    assert_same_bits(stream.memory.state[0], checkpoint.memory.query_init.detach())


def test_leaves_the_models_own_memory_unfrozen():
    checkpoint = make_checkpoint()
    assert sampler("frozen", checkpoint).generator.memory.config.frozen
    assert not checkpoint.memory.config.frozen
