"""Start attention by place, and the memory as a copier, so that learning has something to improve.

With rotary positions a random query is nearly blind to where a key stands, and small models spend most of their
training on finding out. A common part of queries and keys in the fastest row and column pairs makes attention prefer
the same place from the first step, one in a temporal pair makes half of the heads prefer the block before and half
the memory's distance; the memory's queries and keys get the same part, and its value path starts as the identity, so
that each memory token begins as a copy of what stood at its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from echo_ext import axis_pairs
from echo_infinity.cache import Geometry
from echo_infinity.config import EchoConfig
from echo_infinity.functional import FunctionalKV
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT

_STRENGTH = 5.0  # of the common part, in root mean squares of what it is added to
_PREVIOUS = 1, 3.0  # temporal pair and distance in frames: the block before, for even heads
_FAR = 2, 10.0  # the memory's ids once the window is full, for odd heads
_KEEP = 0.1  # of the random start in projections that the copier overrides
_LINEAR_GELU = 3.0  # so far right, GELU is the identity plus a shift that the next bias takes back


@torch.no_grad()
def attend_by_place(config: EchoConfig, model: CausalDiT, latents: Tensor, text: Tensor) -> None:
    """Give every head's queries and keys a common part that prefers one place and one distance in time, in place.

    Args:
        config: geometry.
        model: fresh or trained for a while.
        latents: ``(B, F, C, h, w)`` clean latents of at least two blocks, to measure how large queries and keys are.
        text: ``(B, n, text_width)`` embeddings of their prompts.
    """
    sizes = _sizes(config, model, latents, text)
    key = common_key(model.config.head_dim, model.config.heads)
    query = common_query(model.config.head_dim, model.config.heads)
    for block in model.layers():
        for linear, pattern in ((block.self_attn.q, query), (block.self_attn.k, key)):
            linear.bias.add_(_STRENGTH * sizes[linear] * pattern)


def _sizes(config: EchoConfig, model: CausalDiT, latents: Tensor, text: Tensor) -> dict[nn.Linear, float]:
    """Root mean square of every self-attention's queries and keys before their norm, the largest over noise levels."""
    sizes: dict[nn.Linear, float] = {}

    def measure(linear: nn.Linear, _: object, out: Tensor) -> None:
        sizes[linear] = max(sizes.get(linear, 0.0), out.square().mean().sqrt().item())

    linears = [x for block in model.layers() for x in (block.self_attn.q, block.self_attn.k)]
    hooks = [linear.register_forward_hook(measure) for linear in linears]
    geometry, cache, per_block = Geometry(config), FunctionalKV(config), config.window.frames_per_block
    generator = torch.Generator().manual_seed(0)
    for start in range(0, latents.shape[1], per_block):
        x0 = latents[:, start : start + per_block]
        for sigma in (0.9, 0.0):
            x = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator)
            level = model.condition(torch.full((1, 1), 1000 * sigma))
            model(x, level, model.encode_text(text), cache, geometry.call(start, per_block))
    for hook in hooks:
        hook.remove()
    return sizes


@torch.no_grad()
def copy_by_place(memory: EvolvingMemory) -> None:
    """Make the memory a copier, in place: each token reads its own place, connector and values are the identity.

    Raises:
        ValueError: the memory has groups, a residual update, or no positions.
    """
    m = memory.config
    if m.groups != 1 or m.residual or not m.positions:
        raise ValueError(f"can only start a memory with one group, a connector and positions as a copier, got {m}")
    pattern, eye = common_key(m.head_dim, m.heads), torch.eye(m.width)
    parts: Any = memory  # torch types every submodule as Tensor or Module
    for i, layer in enumerate(parts.layers):
        layer.q.weight.mul_(_KEEP)
        layer.q.bias.copy_(pattern)
        layer.o.bias.zero_()
        layer.ffn[2].weight.mul_(_KEEP)
        if i == 0:
            layer.o.weight.copy_(eye)
        else:
            layer.o.weight.mul_(_KEEP)
    into, _, out, _ = parts.connector_proj
    for linear, shift in ((into, _LINEAR_GELU), (out, -_LINEAR_GELU)):
        linear.weight.copy_(eye)
        linear.bias.fill_(shift)
    parts.gate_linear.weight.mul_(_KEEP)
    nn.init.constant_(parts.gate_linear.bias, m.gate_bias)
    parts.to_k.weight.mul_(_KEEP)
    parts.to_k.bias.copy_(pattern)
    if m.normalise_keys:
        # A key that is all pattern would drown the others: as long as a model's key is in these pairs.
        parts.norm_k_out.weight.fill_(_STRENGTH / (1 + 3 * _STRENGTH**2 / m.head_dim) ** 0.5 / (m.head_dim / 3) ** 0.5)
    parts.to_v.weight.copy_(eye / (1 - torch.sigmoid(torch.tensor(m.gate_bias))))  # undoes what a write keeps back
    parts.to_v.bias.zero_()


def common_key(head_dim: int, heads: int) -> Tensor:
    """``(D,)``: a one in the first element of every head's fastest row and column pair and of one temporal pair."""
    n_t, n_row, _ = axis_pairs(head_dim)
    pattern = torch.zeros(heads, head_dim)
    pattern[:, [2 * n_t, 2 * (n_t + n_row)]] = 1
    for head, (pair, _) in enumerate(_temporal(heads)):
        pattern[head, 2 * pair] = 1
    return pattern.flatten()


def common_query(head_dim: int, heads: int) -> Tensor:
    """``(D,)``: the part that, rotated, meets :func:`common_key` best at the same place and the head's distance."""
    n_t, _, _ = axis_pairs(head_dim)
    pattern = common_key(head_dim, heads).view(heads, head_dim).clone()
    for head, (pair, distance) in enumerate(_temporal(heads)):
        angle = torch.tensor(distance * 10000.0 ** (-pair / n_t))
        pattern[head, 2 * pair], pattern[head, 2 * pair + 1] = angle.cos(), -angle.sin()
    return pattern.flatten()


def _temporal(heads: int) -> list[tuple[int, float]]:
    return [_PREVIOUS if head % 2 == 0 else _FAR for head in range(heads)]
