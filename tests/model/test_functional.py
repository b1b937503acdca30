"""The functional twin against the ring, and against the stream spelt out in float64; gradients through evictions."""

import pytest
import torch
from echo_infinity.cache import Geometry, RingKV
from echo_infinity.config import EchoConfig, ModelConfig, WindowConfig
from echo_infinity.functional import FunctionalKV
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.recall import StreamMemory
from numerics import assert_no_worse_than
from plain import plain_stream

SMALL = ModelConfig(width=24, heads=2, layers=2, ffn=32, latent_channels=2, text_tokens=3, text_width=4, time_width=8)
LEVELS = (1000.0, 625.0, 0.0)  # two denoising calls and the context pass
WINDOWS = {
    "official": WindowConfig(),
    "no sink": WindowConfig(sink_frames=0, window_frames=9),
    "sink larger than a block": WindowConfig(sink_frames=5, window_frames=12),
    "window of one block": WindowConfig(sink_frames=3, window_frames=6),
    "sink and ring no multiples of a block": WindowConfig(sink_frames=1, window_frames=9, frames_per_block=3, p_max=13),
    "absolute ids": WindowConfig(relative=False),
}


@pytest.fixture
def exact_tables(monkeypatch):
    """Leave the rotation tables in float64, so that the whole engine can be compared in float64."""
    monkeypatch.setattr("echo_ext.rope._cos_sin", lambda angles: torch.stack([angles.cos(), angles.sin()], dim=-1))


def world(window, *, blocks=10, batch=2, dtype=torch.float64, frames=2):
    """Configuration, model, memory, geometry, inputs, text and noise levels of one small random stream."""
    memory_config = MemoryConfig(width=24, heads=2, frames=frames, tokens_per_frame=4)
    config = EchoConfig(model=SMALL, latent_rows=4, latent_columns=4, window=window, memory=memory_config)
    model, memory = CausalDiT(SMALL).to(dtype), EvolvingMemory(memory_config).to(dtype)
    with torch.no_grad():
        memory.query_init.normal_()  # a learned start, so that the first write already matters
        memory.gate_linear.bias.zero_()
    shape = (batch, window.frames_per_block, 2, 4, 4)
    inputs = [[torch.randn(shape, dtype=dtype) for _ in LEVELS] for _ in range(blocks)]
    words = torch.randn(batch, 3, 4, dtype=dtype)
    return config, model, memory, Geometry(config), inputs, words


def engine_stream(cache, model, memory, config, geometry, inputs, words):
    """Flows of every call, by the engine's own parts in the sampler's order; and the last memory state."""
    text, levels = conditions(model, words)
    stream = None if memory is None else StreamMemory(memory, config, len(words))
    frames, flows = config.window.frames_per_block, []
    for block, calls in enumerate(inputs):
        call = geometry.call(block * frames, frames, memory_frames=0 if memory is None else memory.config.frames)
        if stream is not None:
            stream.prepare(cache, call)
        for i, x in enumerate(calls):
            seen = None if stream is None else stream.read(call)
            flows.append(model(x, levels[i], text, cache, call, seen))
            if i == 0 and stream is not None:
                stream.publish()
    return flows, stream


def conditions(model, words):
    return model.encode_text(words), [model.condition(torch.full((1, 1), t)) for t in LEVELS]


@pytest.mark.parametrize("with_memory", [True, False], ids=["memory", "no memory"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_ring_and_twin_equal_the_stream_spelt_out(window, with_memory, exact_tables):
    """30 frames: many evictions, ids saturate at p_max, wrapped frames; every call of every block."""
    config, model, memory, geometry, inputs, words = world(window)
    memory = memory if with_memory else None
    text, levels = conditions(model, words)
    expected = plain_stream(model, memory, config, geometry, inputs, text, levels)
    for cache in (RingKV(config, 2, torch.float64), FunctionalKV(config)):
        flows, stream = engine_stream(cache, model, memory, config, geometry, inputs, words)
        for flow, exact in zip(flows, expected, strict=True):
            assert_no_worse_than(flow, exact, exact)
        assert stream is None or stream.writes >= 3


@pytest.mark.parametrize("name", ["official", "sink larger than a block"])
@torch.no_grad()
def test_twin_is_as_exact_as_the_ring_in_float32(name):
    config, model, memory, geometry, inputs, words = world(WINDOWS[name], dtype=torch.float32, blocks=9)
    parts = model, memory, config, geometry, inputs, words
    ring, _ = engine_stream(RingKV(config, 2), *parts)
    twin, _ = engine_stream(FunctionalKV(config), *parts)
    text, levels = conditions(model.double(), words.double())
    wide = [[x.double() for x in calls] for calls in inputs]
    exact = plain_stream(model, memory.double(), config, geometry, wide, text, levels)
    for x, y, z in zip(twin, ring, exact, strict=True):
        assert_no_worse_than(x, y, z)


@pytest.mark.parametrize("name", ["official", "no sink", "sink and ring no multiples of a block"])
def test_gradients_through_evictions_equal_those_of_the_stream_spelt_out(name, exact_tables):
    """Weights earn gradients through frames that have left: keys and values of block 0 reach the last block's loss."""
    config, model, memory, geometry, inputs, words = world(WINDOWS[name], blocks=8, batch=1)
    names, weights = zip(
        *model.named_parameters(prefix="model"), *memory.named_parameters(prefix="memory"), strict=True
    )
    text, levels = conditions(model, words)
    flows, stream = engine_stream(FunctionalKV(config), model, memory, config, geometry, inputs, words)
    assert stream.writes >= 4
    expected = plain_stream(model, memory, config, geometry, inputs, text, levels)
    directions = [torch.randn_like(x) for x in flows]

    def gradients(outputs):
        loss = sum((x * d).sum() for x, d in zip(outputs, directions, strict=True))
        return torch.autograd.grad(loss, weights, allow_unused=True)

    for name, ours, plain in zip(names, gradients(flows), gradients(expected), strict=True):
        assert plain is not None, name
        assert plain.abs().max() > 0, name
        assert_no_worse_than(ours, plain, plain)


def test_reads_made_without_gradient_do_not_serve_a_call_that_wants_one():
    config, model, memory, geometry, inputs, words = world(WINDOWS["official"], blocks=5)
    with torch.no_grad():
        _, stream = engine_stream(FunctionalKV(config), model, memory, config, geometry, inputs, words)
        call = geometry.call(15, 3, memory_frames=2)
        frozen = stream.read(call)
    (k, v), *_ = stream.read(call)
    assert not frozen[0][0].requires_grad
    assert k.requires_grad
    (k.sum() + v.sum()).backward()
    assert memory.to_k.weight.grad is not None


def test_detach_cuts_the_history_of_reads_too():
    config, model, memory, geometry, inputs, words = world(WINDOWS["official"], blocks=5)
    _, stream = engine_stream(FunctionalKV(config), model, memory, config, geometry, inputs, words)
    call = geometry.call(15, 3, memory_frames=2)
    for _ in range(2):
        stream.read(call)[0][0].sum().backward()  # a kept read would go back through a freed graph
        stream.detach()
    assert not stream.state.requires_grad


def test_keeps_no_more_frames_than_the_window():
    config, model, memory, geometry, inputs, words = world(WINDOWS["sink larger than a block"], blocks=9)
    cache = FunctionalKV(config)
    with torch.no_grad():
        engine_stream(cache, model, memory, config, geometry, inputs, words)
    for held in cache._held:
        assert held.frames == [*range(5), *range(20, 27)]
        assert held.k.shape == held.v.shape == (2, 12 * 4, 2, 12)
    assert [held.raw is None for held in cache._held] == [True] * (len(cache._held) - 1) + [False]
    assert cache._held[-1].raw.shape == (2, 12 * 4, 2, 12)


def test_sink_of_an_empty_cache_is_an_error():
    config, *_ = world(WINDOWS["official"], blocks=0)
    with pytest.raises(ValueError, match="the sink is empty: no block has been cached"):
        FunctionalKV(config).sink()
