"""What attention sees, as plain lists of frames, and a cache that attends to just that: every frame kept for ever.

A list holds, per kept frame, its temporal id, the frames that it is made of with their weights, and whether it is
pooled. Nothing of the engine's caches, tiers or plans is used.
"""

from dataclasses import dataclass

import torch
from echo_infinity.config import EchoConfig, ModelConfig, SamplerConfig, WindowConfig
from echo_infinity.functional import FunctionalKV
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.noise import counter_noise
from echo_infinity.policies import POLICIES, make_sampler
from echo_infinity.weights import Checkpoint
from numerics import assert_no_worse_than
from plain import rms, rotate, softmax_attention

SMALL = ModelConfig(width=24, heads=2, layers=2, ffn=32, latent_channels=2, text_tokens=3, text_width=4, time_width=8)
LEVELS = (1000.0, 500.0, 0.0)  # two denoising calls and the context pass
WINDOWS = {
    "official": WindowConfig(),
    "long local": WindowConfig(sink_frames=3, window_frames=15),
    "two blocks of sink": WindowConfig(sink_frames=6, window_frames=15, p_max=18),
    "blocks of two": WindowConfig(sink_frames=2, window_frames=8, frames_per_block=2, p_max=10),
    "absolute ids": WindowConfig(relative=False),
}


@dataclass(frozen=True)
class Seen:
    """A frame of keys and values that attention sees."""

    id: float
    made_of: dict[int, float]
    pooled: bool = False


def whole(frames, ids):
    return [Seen(i, {f: 1.0}) for f, i in zip(frames, ids, strict=True)]


def tiers(window, start):
    """Frames and ids of sink and window in the call at ``start``: (sink, local frames, local ids)."""
    end = start + window.frames_per_block
    sink = list(range(min(window.sink_frames, end)))
    local = list(range(max(window.sink_frames, end - window.window_frames + window.sink_frames), end))
    last = min(end, window.p_max) - 1 if window.relative else end - 1
    return whole(sink, sink), local, list(range(last - len(local) + 1, last + 1))


def make_checkpoint(window=None, dtype=torch.float64, seed=0, memory=True):
    """A small model with random weights, 4 tokens a frame; nothing is written to disk."""
    torch.manual_seed(seed)
    window = window or WINDOWS["official"]
    settings = MemoryConfig(width=24, heads=2, frames=window.frames_per_block, tokens_per_frame=4)
    config = EchoConfig(
        model=SMALL,
        latent_rows=4,
        latent_columns=4,
        window=window,
        memory=settings if memory else None,
        sampler=SamplerConfig(steps=(1000, 500)),
    )
    module = EvolvingMemory(settings).to(dtype) if memory else None
    if module is not None:
        torch.nn.init.normal_(module.query_init)
        torch.nn.init.zeros_(module.gate_linear.bias)
    return Checkpoint(config, CausalDiT(SMALL).to(dtype), module, None, None, "")


@torch.no_grad()
def encode(checkpoint, batch=1):
    words = torch.randn(batch, 3, 4, generator=torch.Generator().manual_seed(1))
    return checkpoint.model.encode_text(words.to(checkpoint.model.dtype))


def sampler(name, checkpoint, seed=0, batch=1):
    noise = counter_noise(seed)
    return make_sampler(
        checkpoint, name, encode(checkpoint, batch), lambda *key: noise(*key).to(checkpoint.model.dtype), batch
    )


class PlainCache:
    """Attends to what ``seen(start, written)`` lists; ``written`` counts the blocks whose leaving has been published.

    A block's first call does not see its own write yet; all later ones do.
    """

    def __init__(self, config, seen):
        self.eps, self.seen = config.model.eps, seen
        rows, columns = config.grid
        self.grid = [(r, c) for r in range(rows) for c in range(columns)]
        self.cells = [(r + 0.5, c + 0.5) for r in range(0, rows, 2) for c in range(0, columns, 2)]
        self.window, self.frames, self.calls = config.window, [{} for _ in range(config.model.layers)], {}

    def attend(self, layer, q, k, v, norms, call, memory, *, output=True):
        q, k = (rms(x.flatten(-2), norm, self.eps).view(x.shape) for x, norm in ((q, norms[0]), (k, norms[1])))
        tokens, held = len(self.grid), self.frames[layer]
        for i in range(call.frames):
            span = slice(i * tokens, (i + 1) * tokens)
            held[call.start + i] = k[:, span], v[:, span]
        if not output:
            return None
        if layer == 0:
            self.calls[call.start] = self.calls.get(call.start, 0) + 1
        keys, values = [], []
        for entry in self.seen(call.start, self.calls[call.start] == 1):
            one_k, one_v = (sum(w * held[f][i] for f, w in entry.made_of.items()) for i in (0, 1))
            if entry.pooled:
                one_k, one_v = self._pool(one_k), self._pool(one_v)
            keys.append(rotate(one_k, [entry.id], self.cells if entry.pooled else self.grid))
            values.append(one_v)
        end = call.start + call.frames
        last = min(end, self.window.p_max) - 1 if self.window.relative else end - 1
        return softmax_attention(rotate(q, range(last - call.frames + 1, last + 1), self.grid), keys, values)

    def _pool(self, x):
        found = []
        for row, column in self.cells:
            near = [t for t, (r, c) in enumerate(self.grid) if abs(r - row) < 1 and abs(c - column) < 1]
            found.append(x[:, near].mean(1))
        return torch.stack(found, 1)


def assert_attends_to(name, window, seen, blocks=14):
    """Ring and twin give, in every call of a random stream, what attention to the listed frames gives.

    Args:
        name: the policy.
        window: geometry of the model that comes under it.
        seen: ``seen(config, start, first)`` lists the frames in a block's first or a later call.
        blocks: length of the stream.
    """
    checkpoint = make_checkpoint(WINDOWS[window])
    stream = sampler(name, checkpoint)
    config, model, frames = stream.generator.config, checkpoint.model, window_block(window)
    levels = [model.condition(torch.full((1, 1), t)) for t in LEVELS]
    inputs = [[torch.randn(1, frames, 2, 4, 4, dtype=torch.float64) for _ in LEVELS] for _ in range(blocks)]
    plain = PlainCache(config, lambda start, first: seen(config.window, start, first))
    geometry, text = stream.generator.geometry, stream.text
    with torch.no_grad():
        expected = [
            model(x, level, text, plain, geometry.call(b * frames, frames))
            for b, calls in enumerate(inputs)
            for x, level in zip(calls, levels, strict=True)
        ]
        for cache in (stream.cache, FunctionalKV(config)):
            recall = POLICIES[name].recall(stream.generator.memory, config, 1)
            flows = run_calls(model, cache, recall, geometry, text, levels, inputs)
            for flow, exact in zip(flows, expected, strict=True):
                assert_no_worse_than(flow, exact, exact)


def window_block(window):
    return WINDOWS[window].frames_per_block


def run_calls(model, cache, recall, geometry, text, levels, inputs):
    """Flows of every call by the engine's parts, in the sampler's order."""
    flows = []
    for block, calls in enumerate(inputs):
        frames = calls[0].shape[1]
        call = geometry.call(block * frames, frames, memory_frames=0 if recall is None else recall.frames)
        if recall is not None:
            recall.prepare(cache, call)
        for i, x in enumerate(calls):
            flows.append(model(x, levels[i], text, cache, call, None if recall is None else recall.read(call)))
            if i == 0 and recall is not None:
                recall.publish()
    return flows


def gone_blocks(window, start, first):
    """Blocks past the sink that have left and been published, as lists of frames, oldest first."""
    b, local = window.frames_per_block, window.window_frames - window.sink_frames
    visible = start if first else start + b
    return [list(range(f, f + b)) for f in range(window.sink_frames, visible - local, b)]
