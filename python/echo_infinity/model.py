"""The causal video diffusion transformer; parameter names are those of the official checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from echo_ext import gated_add, gated_modulate, linear, modulate, padded_attention, rms_norm
from echo_infinity.cache import KV, Call
from echo_infinity.config import ModelConfig


class Cache(Protocol):
    """What self-attention needs of a cache: :class:`RingKV` while streaming, :class:`FunctionalKV` in training."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor, Tensor],
        call: Call,
        memory: KV | None,
        *,
        output: bool = True,
    ) -> Tensor | None: ...


class Conditioning(NamedTuple):
    """What a timestep does to every layer; computed once per noise level and kept for the stream."""

    layers: list[tuple[Tensor, ...]]  # per layer shift, 1 + scale, gate, twice: 6 x (B, F, 1, D)
    head: tuple[Tensor, Tensor]  # shift, 1 + scale: (B, F, 1, D)


class TextKV(KV):
    """Keys and values of an embedded prompt, which know that their last ``padding`` tokens are one and the same."""

    padding = 0


class CausalDiT(nn.Module):
    """Predict the flow of a block of latent frames from its noisy latents, the cache, the memory and the text.

    Args:
        config: shape of the network.

    Source: docs/method.md section 5; names in section 10.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, _, ph, pw = config.width, *config.patch
        self.patch_embedding = nn.Conv3d(config.latent_channels, d, config.patch, stride=config.patch)
        self.text_embedding = _mlp(config.text_width, d, d)
        self.time_embedding = nn.Sequential(nn.Linear(config.time_width, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(d, ph * pw * config.latent_channels, config.eps)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.patch_embedding.weight.dtype

    def layers(self) -> list[Block]:
        """The transformer layers, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def encode_text(self, embeddings: Tensor) -> list[KV]:
        """Project a prompt to each layer's cross-attention K/V, once per prompt.

        Args:
            embeddings: ``(B, n, text_width)``, ``n <= text_tokens``, on any device; padded with zeros to
                ``text_tokens``, and the padding is attended to, as in training.

        Returns:
            Per layer keys (normalised over D) and values, ``(B, text_tokens, H, d)``.

        Raises:
            ValueError: too many tokens, or another width.
        """
        c = self.config
        if embeddings.ndim != 3 or embeddings.shape[1] > c.text_tokens or embeddings.shape[2] != c.text_width:
            raise ValueError(
                f"text embeddings must be (B, <= {c.text_tokens}, {c.text_width}), got {tuple(embeddings.shape)}"
            )
        padded = nnf.pad(embeddings, (0, 0, 0, c.text_tokens - embeddings.shape[1]))
        context = self.text_embedding(padded.to(self.patch_embedding.weight))
        written = padded.ne(0).any(dim=-1).any(dim=0).nonzero()  # tokens that hold a word of any prompt
        padding = c.text_tokens - (int(written[-1]) + 1 if len(written) else 0)
        texts = [TextKV(block.encode_text(context)) for block in self.layers()]
        for text in texts:
            text.padding = padding
        return list(texts)

    def condition(self, t: Tensor) -> Conditioning:
        """Turn timesteps into each layer's shifts, scales and gates.

        Args:
            t: ``(B, F)`` timesteps in 0 .. 1000, one a frame.

        Returns:
            :class:`Conditioning` in the weights' dtype; sinusoid in float64, the embedding's linears in the weights'.
        """
        e = self.time_embedding(sinusoid(t, self.config.time_width).to(self.dtype))  # (B, F, D)
        e0 = self.time_projection(e).unflatten(-1, (6, -1))  # (B, F, 6, D)
        layers = [block.condition(e0) for block in self.layers()]
        shift, scale = (self.head.modulation + e[:, :, None]).chunk(2, dim=2)
        return Conditioning(layers, (shift, 1 + scale))

    def forward(
        self,
        x: Tensor,
        conditioning: Conditioning,
        text: list[KV],
        cache: Cache,
        call: Call,
        memory: Sequence[KV] | None = None,
        *,
        output: bool = True,
    ) -> Tensor | None:
        """Run one pass over a block, writing its K/V into ``cache``.

        Args:
            x: ``(B, F, C, h, w)`` noisy latents, or clean ones in a context pass.
            conditioning: from :meth:`condition`.
            text: from :meth:`encode_text`.
            cache: the stream's cache; its slots of this block are overwritten.
            call: plan of the block.
            memory: per layer rotated memory K/V, or None.
            output: False stops after the last layer's K/V are written (context pass) and returns None.

        Returns:
            ``(B, F, C, h, w)`` predicted flow, noise - x0.
        """
        h = self.transform(self.patchify(x), conditioning, text, cache, call, memory, output=output)
        return None if h is None else self.unpatchify(h, x.shape)

    def transform(
        self,
        h: Tensor,
        conditioning: Conditioning,
        text: list[KV],
        cache: Cache,
        call: Call,
        memory: Sequence[KV] | None = None,
        *,
        output: bool = True,
    ) -> Tensor | None:
        """Run a pass over tokens ``(B, T, D)``, as many of each frame, and return their flow's patches."""
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            kept = output or i < last
            h = block(
                h, conditioning.layers[i], text[i], cache, i, call, None if memory is None else memory[i], output=kept
            )
        return self.head(h, conditioning.head) if output else None

    def patchify(self, x: Tensor) -> Tensor:
        """Embed the patches of latents ``(B, F, C, h, w)``, frame by frame and row by row: ``(B, T, D)``."""
        _, ph, pw = self.config.patch
        b, f, c, height, width = x.shape
        x = x.to(self.dtype)
        patches = x.reshape(b, f, c, height // ph, ph, width // pw, pw).permute(0, 1, 3, 5, 2, 4, 6)
        weight = self.patch_embedding.weight.flatten(1)  # (D, C * ph * pw)
        return linear(patches.reshape(b, -1, weight.shape[1]), weight, self.patch_embedding.bias)

    def unpatchify(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Put the patches ``(B, T, ph * pw * C)`` that the head gives together to latents of ``shape``."""
        _, ph, pw = self.config.patch
        b, frames, _, height, width = shape
        x = x.reshape(b, frames, height // ph, width // pw, ph, pw, -1).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(b, frames, -1, height, width)


class Block(nn.Module):
    """Self-attention over the stream, cross-attention to the text, feed-forward; modulated by the timestep."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.eps = config.eps
        self.checkpointing = False  # in training: recompute all but attention in the backward pass
        self.modulation = nn.Parameter(torch.randn(1, 6, d) / d**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(d, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(*_mlp(d, config.ffn, d))

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        text: KV,
        cache: Cache,
        layer: int,
        call: Call,
        memory: KV | None,
        *,
        output: bool = True,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        norms = self.self_attn.norm_q.weight, self.self_attn.norm_k.weight
        again = self.checkpointing and torch.is_grad_enabled()
        q, k, v = _recompute(self.project, x, shift1, scale1) if again else self.project(x, shift1, scale1)
        y = cache.attend(layer, q, k, v, norms, call, memory, output=output)
        if y is None:
            return x
        rest = x, y, gate1, text, shift2, scale2, gate2
        return _recompute(self.finish, *rest) if again else self.finish(*rest)

    def encode_text(self, context: Tensor) -> KV:
        """Keys and values ``(B, n, H, d)`` of the embedded prompt ``(B, n, D)`` for this layer's cross-attention."""
        return self.cross_attn.encode(context)

    def condition(self, e0: Tensor) -> tuple[Tensor, ...]:
        """What a timestep's embedding ``(B, F, 6, D)`` does to this layer: shift, 1 + scale, gate, twice."""
        return _modulation(self.modulation, e0)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Everything before attention: queries, keys and values ``(B, T, H, d)``, before norm and rotation."""
        return self.self_attn.project(modulate(x, shift, scale, self.eps))

    def finish(
        self, x: Tensor, y: Tensor, gate1: Tensor, text: KV, shift2: Tensor, scale2: Tensor, gate2: Tensor
    ) -> Tensor:
        """Everything after attention, whose output ``y`` is ``(B, T, H, d)``."""
        norm3 = self.norm3
        x, h = gated_modulate(x, self.self_attn.o(y.flatten(-2)), gate1, norm3.bias, norm3.weight, norm3.eps)
        x, h = gated_modulate(x, self.cross_attn(h, text), None, shift2, scale2, self.eps)
        return gated_add(x, self.ffn(h), gate2)


class SelfAttention(nn.Module):
    """Projections around the cache's attention; norms and rotation happen where K is written."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (Linear(d, d) for _ in range(4))
        self.norm_q = nn.RMSNorm(d, eps=config.eps)
        self.norm_k = nn.RMSNorm(d, eps=config.eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, T, H, d)`` of ``x`` ``(B, T, D)``."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q, self.k, self.v))
        return q, k, v


class CrossAttention(nn.Module):
    """Attention to the prompt; K/V are made once per prompt by :meth:`encode`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (Linear(d, d) for _ in range(4))
        self.norm_q = nn.RMSNorm(d, eps=config.eps)
        self.norm_k = nn.RMSNorm(d, eps=config.eps)

    def encode(self, context: Tensor) -> KV:
        """Keys (normalised) and values ``(B, n, H, d)`` of the embedded prompt ``(B, n, D)``."""
        split = (self.heads, -1)
        return _normalise(self.norm_k, self.k(context)).unflatten(-1, split), self.v(context).unflatten(-1, split)

    def forward(self, x: Tensor, text: KV) -> Tensor:
        q = _normalise(self.norm_q, self.q(x)).unflatten(-1, (self.heads, -1))
        k, v = (y.to(q.dtype).expand(q.shape[0], -1, -1, -1) for y in text)
        padding = text.padding if isinstance(text, TextKV) else 0
        return self.o(padded_attention(q, k, v, padding).flatten(-2))


class Linear(nn.Linear):
    """A linear layer that takes the fastest product of the device."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; the first two in one call, unless another layer stands in for the first."""

    def forward(self, x: Tensor) -> Tensor:
        up, gelu, down = self
        return down(linear(x, up.weight, up.bias, gelu=True) if type(up) is Linear else gelu(up(x)))


class Head(nn.Module):
    """Modulated norm and projection to latent patches."""

    def __init__(self, width: int, out: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.head = Linear(width, out)

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(modulate(x, *modulation, self.eps))


def sinusoid(t: Tensor, width: int) -> Tensor:
    """``cat[cos, sin](t * 10000^(-i / (width / 2)))`` in float64, ``(..., width)``."""
    half = width // 2
    frequencies = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _normalise(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    x = x.to(norm.weight.dtype)  # under autocast x is narrower than the weight, which torch only does slowly
    return rms_norm(x, norm.weight, norm.eps or 0.0)


def _recompute(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(Linear(width, hidden), nn.GELU(approximate="tanh"), Linear(hidden, out))


def _modulation(own: Tensor, e0: Tensor) -> tuple[Tensor, ...]:
    shift1, scale1, gate1, shift2, scale2, gate2 = (own[:, None] + e0).split(1, dim=2)  # own (1, 6, D), e0 (B, F, 6, D)
    return shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2
