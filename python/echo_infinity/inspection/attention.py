"""Attention and gates that the ops never hand out, computed again from the references beside the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from echo_ext import rope_rotate
from echo_ext.attention import shift_queries
from echo_ext.memory import RopeTables, Segment
from echo_infinity.cache import KV, Call, RingKV
from echo_infinity.memory import EvolvingMemory

_EPS = 1e-6
_CHUNK = 256  # queries whose scores are held at a time


class Reading(NamedTuple):
    """Where the queries of one layer look; shares of the softmax, mean over the batch."""

    tiers: Tensor  # (H, Tq, 3) sink, memory, local: they sum to 1
    memory: Tensor  # (Tm,) of each memory token, mean over heads and queries; empty without memory
    output: Tensor  # (B, Tq, H, d) what the layer reads, for checking


class Writing(NamedTuple):
    """What one memory write reads and keeps."""

    attention: Tensor  # (layers, G * T, Tk) of each memory token over the evicted tokens, mean over batch and heads
    gate: Tensor | None  # (B, G * T, D) share of the old state that is kept; None for the residual update
    state: Tensor  # (G, B, T, D) the new state, for checking


def explain_reading(
    cache: RingKV, layer: int, q: Tensor, norm: Tensor, call: Call, memory: KV | None, eps: float
) -> Reading:
    """Compute what :meth:`RingKV.attend` has just read in one layer.

    Args:
        cache: after the call's keys and values were written.
        layer: index of the transformer layer.
        q: ``(B, T, H, d)`` projected queries, before norm and rotation.
        norm: ``(D,)`` scale of the query norm.
        call: plan of the block.
        memory: rotated memory keys and values, or None.
        eps: of the norm.
    """
    per = cache.tokens_per_frame
    split, end = call.slots.sink * per, (call.slots.sink + call.slots.local) * per
    width = q.shape[2] * q.shape[3]
    normed = torch.rms_norm(q.float().flatten(2), (width,), norm.float(), eps).unflatten(2, q.shape[2:])
    turned = rope_rotate(normed, call.frame_table, call.grid_table, backend="reference")
    fixed = turned if call.shift is None else shift_queries(turned, call.shift)
    k, v = cache.k[layer].float(), cache.v[layer].float()
    tiers = [(fixed, k[:, :split], v[:, :split])]
    if memory is not None:
        tiers.append((fixed, memory[0].float(), memory[1].float()))
    tiers.append((turned, k[:, split:end], v[:, split:end]))
    sizes = [keys.shape[1] for _, keys, _ in tiers]
    shares, outputs, of_memory = [], [], torch.zeros(sizes[1] if memory is not None else 0)
    for first in range(0, q.shape[1], _CHUNK):
        some = slice(first, first + _CHUNK)
        scores = torch.cat([torch.einsum("bihd,bjhd->bhij", x[:, some], keys) for x, keys, _ in tiers], -1)
        parts = (scores * q.shape[3] ** -0.5).softmax(-1).split(sizes, -1)
        reads = [torch.einsum("bhij,bjhd->bihd", p, values) for p, (_, _, values) in zip(parts, tiers, strict=True)]
        outputs.append(torch.stack(reads).sum(0))
        masses = [part.sum(-1).mean(0) for part in parts]  # (H, Tq)
        if memory is None:
            masses.insert(1, torch.zeros_like(masses[0]))
        else:
            of_memory = of_memory + parts[1].sum(2).mean((0, 1)).cpu()
        shares.append(torch.stack(masses, -1))
    return Reading(torch.cat(shares, 1).cpu(), of_memory / q.shape[1], torch.cat(outputs, 1))


def explain_writing(
    module: EvolvingMemory,
    state: Tensor,
    segments: Sequence[Segment],
    sink: Segment | None = None,
    q_rope: RopeTables | None = None,
    k_rope: Sequence[RopeTables] | None = None,
) -> Writing:
    """Compute what :meth:`EvolvingMemory.write` reads, keeps and returns, with the same arguments.

    Source: docs/method.md section 4.
    """
    config = module.config
    groups, batch, tokens, width = state.shape
    read = [*([] if sink is None else [sink]), *segments]
    keys = [k.float() for k, _ in read]
    if k_rope is not None:
        keys = [rope_rotate(k, *tables, backend="reference") for k, tables in zip(keys, k_rope, strict=True)]
    key, value = torch.cat(keys, 1), torch.cat([v.float() for _, v in read], 1)
    if q_rope is not None:
        q_rope = q_rope[0].repeat(1, groups, 1, 1), q_rope[1]
    weights = {name: x.float() for name, x in module.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return nnf.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return torch.rms_norm(x, (width,), weights[f"{name}.weight"], _EPS)

    x = state.float().transpose(0, 1).reshape(batch, groups * tokens, width)
    looks = []
    for i in range(config.layers):
        at = f"layers.{i}"
        q = norm(f"{at}.norm_q", linear(f"{at}.q", norm(f"{at}.norm1", x))).unflatten(-1, (config.heads, -1))
        if q_rope is not None:
            q = rope_rotate(q, *q_rope, backend="reference")
        share = (torch.einsum("bihd,bjhd->bhij", q, key) * config.head_dim**-0.5).softmax(-1)
        looks.append(share.mean((0, 1)).cpu())
        x = x + linear(f"{at}.o", torch.einsum("bhij,bjhd->bihd", share, value).flatten(2))
        hidden = nnf.gelu(linear(f"{at}.ffn.0", norm(f"{at}.norm2", x)), approximate="tanh")
        x = x + linear(f"{at}.ffn.2", hidden)
    new = x.unflatten(1, (groups, tokens)).transpose(0, 1)
    gate = None
    if not config.residual:
        kept, blended = [], []
        for g in range(groups):
            connector, gating = _names(config.groups, g)
            hidden = nnf.gelu(linear(f"{connector}.0", new[g]), approximate="tanh")
            proposal = norm(f"{connector}.3", linear(f"{connector}.2", hidden))
            kept.append(linear(gating, torch.cat([state[g].float(), proposal], -1)).sigmoid())
            blended.append(torch.lerp(proposal, state[g].float(), kept[-1]))
        gate, new = torch.cat(kept, 1).cpu(), torch.stack(blended)
    if config.post_norm:
        new = norm("post_norm", new)
    return Writing(torch.stack(looks), gate, new)


def _names(groups: int, g: int) -> tuple[str, str]:
    """Official names of group ``g``'s connector and gate."""
    return ("connector_proj", "gate_linear") if groups == 1 else (f"connector_projs.{g}", f"gate_linears.{g}")
