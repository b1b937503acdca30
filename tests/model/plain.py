"""The stream spelt out, as an oracle: every frame kept for ever, tiers chosen by frame number, one softmax.

Independent of the engine's caches, tables, plans and write op: keys stay unrotated and are rotated afresh by
complex numbers at the ids of the call; the memory is written from the kept frames, module by module.
"""

import torch
from torch import nn


def rms(x, weight, eps=1e-6):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x, ids, grid):
    """Rotate ``x`` ``(B, len(ids) * T_f, H, d)`` by frame ids and the ``(row, column)`` pairs of ``grid``."""
    spatial = x.shape[-1] // 2 // 3

    def angles(p, pairs):
        j = torch.arange(pairs, dtype=torch.float64)
        return torch.as_tensor(p, dtype=torch.float64)[:, None] * 10000 ** (-2 * j / (2 * pairs))

    frame = angles(list(ids), x.shape[-1] // 2 - 2 * spatial)[:, None].expand(-1, len(grid), -1)
    cells = torch.cat([angles([p[axis] for p in grid], spatial) for axis in (0, 1)], -1)
    phase = torch.cat([frame, cells[None].expand(len(frame), -1, -1)], -1).flatten(0, 1)[:, None]
    turn = torch.polar(torch.ones_like(phase), phase)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.to(pairs.dtype)).flatten(-2)


def softmax_attention(q, keys, values):
    """One softmax over the concatenated tiers."""
    k, v = torch.cat(keys, 1), torch.cat(values, 1)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


class PlainKV:
    """Stands in for a cache: ``frames[layer][f]`` holds normalised, unrotated K and V of every frame so far."""

    def __init__(self, config):
        self.window, self.eps = config.window, config.model.eps
        rows, columns = config.grid
        self.grid = [(r, c) for r in range(rows) for c in range(columns)]
        self.frames = [{} for _ in range(config.model.layers)]

    def attend(self, layer, q, k, v, norms, call, memory, *, output=True):
        """``memory`` is this layer's K and V before rotation, or None."""
        w, held = self.window, self.frames[layer]
        q, k = (rms(x.flatten(-2), norm, self.eps).view(x.shape) for x, norm in ((q, norms[0]), (k, norms[1])))
        tokens = len(self.grid)
        for i in range(call.frames):
            span = slice(i * tokens, (i + 1) * tokens)
            held[call.start + i] = k[:, span], v[:, span]
        if not output:
            return None
        end = call.start + call.frames
        sink = range(min(w.sink_frames, end))
        local = range(max(w.sink_frames, end - (w.window_frames - w.sink_frames)), end)
        if w.relative:
            last = min(end - 1, w.p_max - 1)
            q_ids = range(last - call.frames + 1, last + 1)
            local_ids = range(last - len(local) + 1, last + 1)
        else:
            q_ids, local_ids = range(call.start, end), local
        keys, values = [], []
        for frames, ids in ((sink, sink), (local, local_ids)):
            if len(frames):
                keys.append(rotate(torch.cat([held[f][0] for f in frames], 1), ids, self.grid))
                values.append(torch.cat([held[f][1] for f in frames], 1))
        if memory is not None:
            count = memory[0].shape[1] // len(self.grid)
            first = local_ids[0] - count if w.relative else max(0, end - len(local) - count)
            keys.append(rotate(memory[0], range(first, first + count), self.grid))
            values.append(memory[1])
        return softmax_attention(rotate(q, q_ids, self.grid), keys, values)

    def leaving(self, start, frames):
        """Last layer's K (rotated where ids are absolute) and V of the frames that the block pushes out, or None."""
        w, held = self.window, self.frames[-1]
        local = w.window_frames - w.sink_frames
        gone = [f for f in range(max(w.sink_frames, start - local), start) if f < start + frames - local]
        if not gone:
            return None
        k, v = torch.cat([held[f][0] for f in gone], 1), torch.cat([held[f][1] for f in gone], 1)
        return k if w.relative else rotate(k, gone, self.grid), v


def write(memory, state, k, v, turn=lambda q: q):
    """One write of an :class:`EvolvingMemory` with one group and a gate; ``turn`` rotates the queries, if any does."""
    x = state
    for layer in memory.layers:
        q = rms(layer.q(rms(x, layer.norm1.weight)), layer.norm_q.weight).unflatten(-1, k.shape[2:])
        x = x + layer.o(softmax_attention(turn(q), [k], [v]).flatten(-2))
        x = x + layer.ffn(rms(x, layer.norm2.weight))
    down, _, up, norm = memory.connector_proj
    proposal = rms(up(nn.functional.gelu(down(x), approximate="tanh")), norm.weight)
    gate = torch.sigmoid(memory.gate_linear(torch.cat([state, proposal], -1)))
    return gate * state + (1 - gate) * proposal


def read(memory, state, heads):
    """K (normalised where configured) and V of ``state``, before rotation."""
    k = memory.to_k(state)
    if memory.config.normalise_keys:
        k = rms(k, memory.norm_k_out.weight)
    return k.unflatten(-1, (heads, -1)), memory.to_v(state).unflatten(-1, (heads, -1))


def plain_stream(model, memory, config, geometry, inputs, text, levels, start=0):
    """Flows of every call of a stream: ``inputs[block][call]`` noisy latents, the last call of a block its context.

    The write happens after a block's first call and is first seen by its second.
    """
    cache, flows, state = PlainKV(config), [], None
    frames, heads = config.window.frames_per_block, config.model.heads
    for block, calls in enumerate(inputs):
        call = geometry.call(start + block * frames, frames)
        for i, x in enumerate(calls):
            seen = None if state is None else [read(memory, state, heads)] * config.model.layers
            flows.append(model(x, levels[i], text, cache, call, seen))
            if i == 0 and memory is not None and (gone := cache.leaving(call.start, frames)) is not None:
                before = memory.query_init.expand(len(x), -1, -1) if state is None else state
                state = write(memory, before, *gone)
    return flows


class PlainSampler:
    """The sampler spelt out around :class:`PlainKV`: blocks, memory writes and prompt switches (sink protected).

    Takes from the engine's ``generator`` its weights, its noise levels and nothing of its caches or plans.
    """

    def __init__(self, generator, text, noise, batch=1):
        self.generator, self.text, self.noise = generator, text, noise
        self.config, self.cache, self.state = generator.config, PlainKV(generator.config), None
        w, m = self.config.window, self.config.model
        self.frames, self.latents = w.frames_per_block, []
        self.shape = (batch, self.frames, m.latent_channels, self.config.latent_rows, self.config.latent_columns)

    def flow(self, x, t, start, *, memory=True):
        g = self.generator
        seen = None
        if memory and self.state is not None:
            seen = [read(g.memory, self.state, self.config.model.heads)] * self.config.model.layers
        return g.model(x, g.level(t), self.text, self.cache, g.geometry.call(start, x.shape[1]), seen)

    def next_block(self):
        g, block = self.generator, len(self.latents)
        start, schedule = block * self.frames, g.schedule
        x = self.noise(block, 0, self.shape)
        for i, t in enumerate(g.timesteps):
            flow = self.flow(x, t, start)
            if i == 0 and g.memory is not None:
                self.write(self.cache.leaving(start, self.frames))
            last = i + 1 == len(g.timesteps)
            after = 0.0 if last else schedule.sigma(g.timesteps[i + 1])
            if last or self.config.sampler.solver == "renoise":
                x = x - schedule.sigma(t) * flow
                if not last:
                    x = (1 - after) * x + after * self.noise(block, i + 1, self.shape)
            else:
                x = x + (after - schedule.sigma(t)) * flow
        self.flow(x, 0.0, start)
        self.latents.append(x)
        return x

    def write(self, leaving):
        if leaving is not None:
            start = self.generator.memory.query_init.expand(self.shape[0], -1, -1)
            self.state = write(self.generator.memory, start if self.state is None else self.state, *leaving)

    def switch(self, text, *, memory_recache=False):
        self.text = text
        w, end = self.config.window, len(self.latents) * self.frames
        local = w.window_frames - w.sink_frames
        start = 0 if end <= w.window_frames else end - local
        sinks = [{f: held[f] for f in range(min(end, w.sink_frames))} for held in self.cache.frames]
        self.flow(torch.cat(self.latents, 1)[:, start:end], 0.0, start, memory=False)
        for held, sink in zip(self.cache.frames, sinks, strict=True):
            held.update(sink)
        if memory_recache and self.state is not None:
            held = [self.cache.frames[-1][f] for f in range(max(w.sink_frames, end - local), end)]
            self.state = None
            self.write((torch.cat([k for k, _ in held], 1), torch.cat([v for _, v in held], 1)))
