"""A generator written as Self-Forcing's code is: list of cache dicts, ``current_start`` in tokens, its own loop."""

import types

import torch
from echo_infinity.adapters.self_forcing import streaming_self_attention
from echo_infinity.schedule import FlowSchedule
from torch import nn


def normed(x, shift, scale):
    """LayerNorm, then a frame's scale (already 1 + s) and shift."""
    frames = shift.shape[1]
    y = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6).unflatten(1, (frames, -1))
    return (y * scale + shift).flatten(1, 2)


class ForcingModel:
    """The golden weights in a model that hands each block ``kv_cache[i]`` and ``current_start``."""

    def __init__(self, dit):
        self.dit = dit
        for block in dit.layers():
            block.self_attn.num_heads = dit.config.heads
            block.self_attn.forward = types.MethodType(streaming_self_attention, block.self_attn)

    def __call__(self, x, t, text, kv_cache, current_start):
        dit, frames = self.dit, x.shape[1]
        levels = dit.condition(t)
        h = dit.patchify(x)
        for i, block in enumerate(dit.layers()):
            shift1, scale1, gate1, shift2, scale2, gate2 = levels.layers[i][:6]
            y = block.self_attn(normed(h, shift1, scale1), None, None, None, None, kv_cache[i], current_start, None)
            h = h + (y.unflatten(1, (frames, -1)) * gate1).flatten(1, 2)
            h = h + block.cross_attn(block.norm3(h), text[i])
            y = block.ffn(normed(h, shift2, scale2))
            h = h + (y.unflatten(1, (frames, -1)) * gate2).flatten(1, 2)
        out = dit.head.head(normed(h, *levels.head))
        return dit.unpatchify(out, x.shape)


@torch.no_grad()
def inference(model, kv_cache, text, noise, blocks, shape, frame_seq_length, steps=(1000, 750, 500, 250)):
    """Self-Forcing's inference loop."""
    schedule, latents = FlowSchedule(5.0), []
    timesteps = schedule.warp(steps)
    for block in range(blocks):
        current_start = block * shape[1] * frame_seq_length
        x = noise(block, 0, shape)
        for i, t in enumerate(timesteps):
            flow = model(x, torch.full((1, shape[1]), t), text, kv_cache, current_start)
            x0 = schedule.to_x0(x, flow, t)
            x = schedule.add_noise(x0, noise(block, i + 1, shape), timesteps[i + 1]) if i + 1 < len(timesteps) else x0
        model(x, torch.zeros(1, shape[1]), text, kv_cache, current_start)  # the context pass
        latents.append(x)
    return torch.cat(latents, 1)
