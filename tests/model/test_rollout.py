"""Whole rollouts and prompt switches against the golden data: every call's flow, latents, memory, cache, attention."""

import pytest
import torch
from micro import micro_stream
from numerics import assert_golden

from echo_ext import frame_table
from echo_ext.rope import rope_rotate_ref

ROLLOUTS = [
    "rollout_nomem",
    "rollout_nomem_absrope",
    "rollout_mem_nk0",
    "rollout_mem_nk1",
    "rollout_mem_nk1_groups3",
    "rollout_mem_sinkanchor_resid",
]
SWITCHES = {
    "switch_f21_nomem_gsink0": {"global_sink": False},
    "switch_f21_recache0_gsink1": {"global_sink": True},
    "switch_f21_recache1_gsink1": {"global_sink": True, "memory_recache": True},
}


def state_kind(name):
    return "residual_sink_anchor" if name == "rollout_mem_sinkanchor_resid" else "value"


@torch.no_grad()
def roll(name, *, blocks=None, at_block=None):
    """Run a golden rollout; returns what was recorded, and calls ``at_block(sampler, block)`` before each block."""
    settings, tensors, recorder, sampler = micro_stream(name)
    attentions = []
    first = recorder.model.blocks[0].self_attn.o
    first.register_forward_hook(lambda module, inputs, out: attentions.append(out))
    latents, states, caches = [], [], {}
    for block in range(blocks or settings["frames"] // settings["block"]):
        if at_block is not None:
            at_block(sampler, block)
        latents.append(sampler.next_block())
        if sampler.memory is not None:
            states.append(sampler.memory.state.clone())
        if block in settings["snapshot_blocks"]:
            caches[block] = golden_cache(sampler)
    return settings, tensors, recorder.flows, torch.cat(latents, 1), states, caches, attentions


def golden_cache(sampler):
    """Cached K (rotated back in relative mode) and V in frame order, as the golden files hold them."""
    cache, w = sampler.cache, sampler.generator.config.window
    held = min(sampler.frame, w.window_frames)
    frames = [*range(min(held, w.sink_frames)), *range(sampler.frame - (held - w.sink_frames), sampler.frame)][:held]
    slots = [f if f < w.sink_frames else w.sink_frames + (f - w.sink_frames) % w.local_frames for f in frames]
    grid = sampler.generator.geometry.grid
    out = {}
    for layer in (0, len(cache.k) - 1):
        k, v = (x[layer].unflatten(1, (w.window_frames, -1))[:, slots].flatten(1, 2) for x in (cache.k, cache.v))
        if w.relative:
            back = frame_table(frames, k.shape[-1]) * torch.tensor([1.0, -1.0])
            k = rope_rotate_ref(k, back, grid * torch.tensor([1.0, -1.0]))
        out[layer] = k, v
    return out


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout_matches_golden_data(name):
    settings, tensors, flows, latents, states, caches, attentions = roll(name)
    kind = state_kind(name)
    assert_golden(torch.stack(flows), tensors["flow"], kind)
    assert_golden(latents, tensors["latents"], kind)
    if settings["memory"] is not None:
        golden = tensors["mem_state"]
        assert_golden(torch.stack(states).view(golden.shape), golden, kind)
    for block, layers in caches.items():
        for layer, (k, v) in layers.items():
            assert_golden(k, tensors[f"cache.block{block}.layer{layer}.k"][:, : k.shape[1]], kind)
            assert_golden(v, tensors[f"cache.block{block}.layer{layer}.v"][:, : v.shape[1]], kind)
    checked = [key for key in tensors if key.startswith("attn0.")]
    for key in checked:
        block, call = (int(part.removeprefix("block").removeprefix("call")) for part in key.split(".")[1:])
        assert_golden(attentions[block * 5 + call], tensors[key], kind)
    assert len(checked) > 0 or name != "rollout_mem_nk1"


@pytest.mark.parametrize("name", SWITCHES)
def test_prompt_switch_matches_golden_data(name):
    recached = {}

    def at_block(sampler, block):
        if block == 7:
            model = sampler.generator.model.model
            flow = sampler.switch(model.encode_text(tensors_of[name][1:2]), **SWITCHES[name])
            recached.update(flow=flow, cache=golden_cache(sampler))
            sampler.generator.model.flows.pop()  # the golden "flow" leaves re-cache calls out

    tensors_of = {name: micro_stream(name)[1]["text"]}
    settings, tensors, flows, latents, states, caches, _ = roll(name, at_block=at_block)
    assert_golden(torch.stack(flows), tensors["flow"])
    assert_golden(latents, tensors["latents"])
    if settings["memory"] is not None:
        golden = tensors["mem_state"]
        assert_golden(torch.stack(states).view(golden.shape), golden)
    frames = recached["flow"].shape[1]  # with a protected sink only the local frames are recomputed
    assert_golden(recached["flow"], tensors["recache0.flow"][:, -frames:])
    for layer, (_, v) in recached["cache"].items():
        assert_golden(v, tensors[f"recache0.layer{layer}.v"])
    for block, layers in caches.items():
        for layer, (_, v) in layers.items():
            assert_golden(v, tensors[f"cache.block{block}.layer{layer}.v"])
