"""Slots against a deque, and the ring cache: what it holds, what it hands out, what it never lets leak."""

from collections import deque

import pytest
import torch
from echo_infinity.cache import Geometry, RingKV, plan_slots
from echo_infinity.config import EchoConfig, ModelConfig, WindowConfig
from echo_infinity.memory import MemoryConfig
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_no_worse_than, assert_same_bits
from plain import PlainKV

from echo_ext import frame_table, rope_rotate

MODEL = ModelConfig(width=32, heads=2, layers=2, ffn=8, latent_channels=1, text_tokens=1, text_width=1)
TOKENS = 2  # a frame
FAR = 345_600  # a day of latent frames


def configured(sink=3, window=12, block=3, *, memory=True, **fields):
    memory = MemoryConfig(width=32, heads=2, frames=1, tokens_per_frame=TOKENS) if memory else None
    window = WindowConfig(sink, window, block, fields.pop("p_max", window + 3), **fields)
    return EchoConfig(model=MODEL, latent_rows=2, latent_columns=4, window=window, memory=memory)


CONFIGS = {
    "official": configured(),
    "no sink": configured(sink=0, window=9),
    "sink larger than a block": configured(sink=5, window=12),
    "a block straddles sink and ring": configured(sink=4, window=9, block=2, memory=False),
    "ring no multiple of a block": configured(sink=1, window=6, block=2),
    "absolute ids": configured(relative=False),
}


def attend(cache, call, *, q=None, k=None, v=None, memory=None):
    """Run a call through every layer; draws what is not given; returns the last layer's output."""
    shape = (cache.k[0].shape[0] if isinstance(cache, RingKV) else 1, call.frames * TOKENS, 2, 16)
    q, k, v = (torch.randn(shape) if x is None else x for x in (q, k, v))
    norms = torch.ones(32), torch.ones(32)
    return [cache.attend(layer, q, k, v, norms, call, memory) for layer in range(2)][-1]


def numbered(call):
    """Values that carry their frame's number."""
    frames = torch.arange(call.start, call.start + call.frames).repeat_interleave(TOKENS)
    return frames.float().view(1, -1, 1, 1).expand(-1, -1, 2, 16).contiguous()


def numbers(v):
    """The frame numbers that values hold."""
    return v[0, ::TOKENS, 0, 0].int().tolist()


@given(sink=st.integers(0, 7), local=st.integers(1, 9), data=st.data())
def test_slots_hold_exactly_what_a_deque_holds(sink, local, data):
    slots, model, kept, start = {}, deque(maxlen=local), [], 0
    for _ in range(data.draw(st.integers(1, 12))):
        most = local + max(0, sink - start)
        frames = data.draw(st.integers(1, most))
        plan = plan_slots(start, frames, sink, local)
        new = list(range(start, start + frames))
        fixed, moving = [f for f in new if f < sink], [f for f in new if f >= sink]
        leaving = list(model)[: max(0, len(model) + len(moving) - local)]
        spans = [slot for a, b in plan.evicted.spans() for slot in range(sink + a, sink + b)]
        assert [slots[slot] for slot in spans] == leaving  # oldest first, one span or two
        assert len(plan.evicted.spans()) <= 2
        assert len(set(plan.write)) == frames
        slots.update(zip(plan.write, new, strict=True))
        model.extend(moving)
        kept += fixed
        assert slots == {**{f: f for f in kept}, **{sink + (f - sink) % local: f for f in model}}
        assert (plan.sink, plan.local) == (len(kept), len(model))
        assert sorted(slots.values()) == sorted([*kept, *model])  # every frame in one tier
        assert set(slots) == {*range(plan.sink), *range(sink, sink + plan.local)}  # filled from the front
        assert plan_slots(start, frames, sink, local) == plan  # a second call at the same start
        start += frames


@pytest.mark.parametrize(("start", "frames"), [(3, 10), (0, 13), (30, 10), (5, 0)])
def test_calls_that_do_not_fit_are_errors(start, frames):
    with pytest.raises(ValueError, match=f"{frames} frames from {start} don't fit 3 sink and 9 local slots"):
        plan_slots(start, frames, 3, 9)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_evicted_local_and_sink_frames_are_views_of_the_last_layer(config):
    w, cache, geometry = config.window, RingKV(config), Geometry(config)
    keys = cache.raw if cache.raw is not None else cache.k[-1]
    assert (cache.raw is not None) == (config.memory is not None and w.relative)
    held = deque(maxlen=w.local_frames)
    for start in range(0, 30, w.frames_per_block):
        assert [f for _, v in cache.local(start) for f in numbers(v)] == list(held)
        call = geometry.call(start, w.frames_per_block)
        moving = [f for f in range(start, start + w.frames_per_block) if f >= w.sink_frames]
        pairs = cache.evicted(call)
        gone = list(held)[: max(0, len(held) + len(moving) - w.local_frames)]
        assert [f for _, v in pairs for f in numbers(v)] == gone
        for k, v in pairs:
            assert k.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
            assert v.untyped_storage().data_ptr() == cache.v[-1].untyped_storage().data_ptr()
        attend(cache, call, v=numbered(call))
        held.extend(moving)
        if start + w.frames_per_block >= w.sink_frames:
            assert numbers(cache.sink()[1]) == list(range(w.sink_frames))


def test_evicted_keys_are_before_rotation_in_relative_mode_and_after_it_in_absolute_mode():
    for name in ("official", "absolute ids"):
        config = CONFIGS[name]
        cache, geometry, plain = RingKV(config), Geometry(config), PlainKV(config)
        for start in range(0, 12, 3):
            q, k, v = (torch.randn(1, 3 * TOKENS, 2, 16) for _ in "qkv")
            for each in (cache, plain):
                attend(each, geometry.call(start, 3), q=q, k=k, v=v)
        ((k, v),) = cache.evicted(geometry.call(12, 3))
        expected = plain.leaving(12, 3)
        assert_no_worse_than(k, expected[0], expected[0])
        assert_same_bits(v, expected[1])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_unused_slots_never_leak(config):
    clean, poisoned, geometry = RingKV(config, 2), RingKV(config, 2), Geometry(config)
    for x in poisoned.tensors().values():
        x.fill_(float("nan"))
    block = config.window.frames_per_block
    for start in range(0, 24, block):
        q, k, v = (torch.randn(2, block * TOKENS, 2, 16) for _ in "qkv")
        out = [attend(cache, geometry.call(start, block), q=q, k=k, v=v) for cache in (clean, poisoned)]
        assert_same_bits(out[1], out[0])
        held = [cache.evicted(geometry.call(start + block, block)) for cache in (clean, poisoned)]
        assert_same_bits(held[1], held[0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_call_at_the_same_start_overwrites_its_own_slots_only(config):
    block, geometry = config.window.frames_per_block, Geometry(config)
    once, twice = RingKV(config), RingKV(config)
    for start in range(0, 24, block):
        call = geometry.call(start, block)
        before = {name: x.clone() for name, x in twice.tensors().items()}
        attend(twice, call)  # a noisy call
        own = set(call.slots.write)
        for name, x in twice.tensors().items():
            others = [s for s in range(config.window.window_frames) if s not in own]
            old, new = (y.unflatten(1, (-1, TOKENS))[:, others] for y in (before[name], x))
            assert_same_bits(new, old)
        q, k, v = (torch.randn(1, block * TOKENS, 2, 16) for _ in "qkv")
        out = [attend(cache, call, q=q, k=k, v=v) for cache in (twice, once)]  # the context call
        assert_same_bits(out[0], out[1])
        assert_same_bits(twice.tensors(), once.tensors())


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_a_call_without_output_writes_the_same_keys_and_values(relative):
    config = configured(relative=relative)
    caches, call = [RingKV(config), RingKV(config)], Geometry(config).call(0, 3)
    q, k, v = (torch.randn(1, 3 * TOKENS, 2, 16) for _ in "qkv")
    norms = torch.rand(32), torch.rand(32)
    outputs = [
        cache.attend(1, q, k, v, norms, call, None, output=out)
        for cache, out in zip(caches, (True, False), strict=True)
    ]
    assert outputs[1] is None
    assert outputs[0] is not None
    assert_same_bits(caches[1].tensors(), caches[0].tensors())


@pytest.mark.parametrize("end", [45, FAR, 3 * 10**9])
def test_attention_is_the_same_for_ever_once_ids_saturate(end):
    """The same frames in sink and ring give frame 345,600 what they give frame 45, up to rounding."""
    config = configured(p_max=21)
    geometry, cache = Geometry(config), RingKV(config)
    plain, wide = PlainKV(config), PlainKV(config)
    k, v = torch.randn(2, 1, TOKENS, 2, 16)
    ids = geometry.call(18, 3, memory_frames=1).ids.memory
    rotated = rope_rotate(k, frame_table(list(ids), 16), geometry.grid), v
    for near, start in zip((0, 36, 39, 42), (0, end - 9, end - 6, end - 3), strict=True):
        inputs, norms = torch.randn(3, 1, 3 * TOKENS, 2, 16), torch.ones(2, 32)
        here, last = geometry.call(near, 3), near == 42
        out = cache.attend(1, *inputs, norms, geometry.call(start, 3, memory_frames=1), rotated, output=last)
        budget = plain.attend(1, *inputs, norms, here, (k, v), output=last)
        exact = wide.attend(1, *inputs.double(), norms.double(), here, (k.double(), v.double()), output=last)
    assert_no_worse_than(out, budget, exact)


def test_sink_can_be_put_back_after_a_recache():
    config = configured()
    cache, geometry = RingKV(config), Geometry(config)
    for start in range(0, 12, 3):
        attend(cache, geometry.call(start, 3))
    before = {name: x.clone() for name, x in cache.tensors().items()}
    saved = cache.copy_sink()
    attend(cache, geometry.call(0, 12))
    cache.restore_sink(saved)
    for name, x in cache.tensors().items():
        assert_same_bits(x[:, : 3 * TOKENS], before[name][:, : 3 * TOKENS])
        assert not torch.equal(x[:, 3 * TOKENS :], before[name][:, 3 * TOKENS :]) or name == "raw"


def test_buffers_are_of_constant_size_and_named():
    cache = RingKV(configured(), batch=2, dtype=torch.bfloat16)
    assert list(cache.tensors()) == ["k.0", "k.1", "v.0", "v.1", "raw"]
    for x in cache.tensors().values():
        assert (x.shape, x.dtype) == ((2, 12 * TOKENS, 2, 16), torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
def test_absolute_and_relative_ids_agree_until_the_range_is_full(name):
    """While no id is clamped there is one frame of reference, and nothing to turn."""
    config = CONFIGS[name]
    block, geometry = config.window.frames_per_block, Geometry(config)
    for start in range(0, 60, block):
        call = geometry.call(start, block)
        clamped = config.window.relative and start + block > config.window.p_max
        assert (call.shift is not None) == clamped
