"""The drop-in for Self-Forcing-type code: golden rollouts from its loop, and a cache used as the dicts it replaces."""

import pytest
import torch
from echo_infinity.adapters.self_forcing import StreamCache, streaming_self_attention
from forcing import ForcingModel, inference
from micro import golden_noise, load, micro_generator
from numerics import assert_golden, assert_same_bits


def forcing(name):
    """(model, cache, text, golden tensors) of a golden rollout."""
    settings, tensors = load(name)
    generator = micro_generator(settings)
    text = generator.model.encode_text(tensors["text"][:1])
    return ForcingModel(generator.model), StreamCache(generator.config, generator.memory), text, tensors


SHAPE, TOKENS = (1, 3, 4, 6, 8), 12


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rollout_nomem", "value"),
        ("rollout_nomem_absrope", "value"),
        ("rollout_mem_nk0", "value"),
        ("rollout_mem_nk1_groups3", "value"),
        ("rollout_mem_sinkanchor_resid", "residual_sink_anchor"),
    ],
)
def test_its_loop_reproduces_the_golden_rollout(name, kind):
    model, cache, text, tensors = forcing(name)
    latents = inference(model, cache, text, golden_noise(tensors), 15, SHAPE, TOKENS)
    assert_golden(latents, tensors["latents"], kind)


def test_the_cache_reads_like_the_dicts_it_replaces():
    model, cache, text, tensors = forcing("rollout_mem_nk1")
    assert len(cache) == 3
    assert set(cache[0]) == {"k", "v", "global_end_index", "local_end_index"}
    assert cache[0]["k"].shape == (1, 12 * TOKENS, 3, 16)
    ends = []
    for blocks in (2, 5):
        cache.reset()
        inference(model, cache, text, golden_noise(tensors), blocks, SHAPE, TOKENS)
        ends.append((cache[1]["global_end_index"].item(), cache[1]["local_end_index"].item()))
    assert ends == [(6 * TOKENS, 6 * TOKENS), (15 * TOKENS, 12 * TOKENS)]


def test_its_own_way_to_reset_starts_a_new_stream():
    model, cache, text, tensors = forcing("rollout_mem_nk1")
    first = inference(model, cache, text, golden_noise(tensors), 7, SHAPE, TOKENS)
    for layer in cache:
        layer["global_end_index"] = torch.tensor([0], dtype=torch.long)
        layer["local_end_index"] = torch.tensor([0], dtype=torch.long)
    assert cache.memory.writes == 0
    assert_same_bits(inference(model, cache, text, golden_noise(tensors), 7, SHAPE, TOKENS), first)


def call(cache, start, tokens=36, layer=0):
    x = torch.zeros(1, tokens, 3, 16)
    return cache.attend(layer, x, x, x, (torch.ones(48), torch.ones(48)), start)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda c: call(c, 0, tokens=35), "35 tokens from 0 are no whole frames of 12"),
        (lambda c: call(c, 7), "36 tokens from 7 are no whole frames of 12"),
        (lambda c: call(c, 72), "a block from frame 6 after 0 frames"),
        (lambda c: c[0].update(k=torch.zeros(1)), "k is the stream's own"),
        (lambda c: c[0].update(global_end_index=torch.tensor([36])), "can only be set to zero"),
        (lambda c: c[0].pop("k"), "can't be removed"),
        (lambda c: c[0]["other"], "other"),
    ],
)
def test_misuse_is_refused(attempt, message):
    with pytest.raises((ValueError, KeyError), match=message):
        attempt(forcing("rollout_mem_nk1")[1])


def test_another_cache_is_refused():
    model = forcing("rollout_nomem")[0]
    attention = model.dit.layers()[0].self_attn
    with pytest.raises(TypeError, match="must be a layer of a StreamCache, got dict"):
        streaming_self_attention(attention, torch.zeros(1, 36, 48), None, None, None, None, {"k": None}, 0)
