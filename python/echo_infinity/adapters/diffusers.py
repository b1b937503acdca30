"""diffusers' WanTransformer3DModel as a block-causal streaming generator, through its attention processors."""

from __future__ import annotations

from types import SimpleNamespace, TracebackType
from typing import Any

from torch import Tensor
from torch.nn import functional as nnf

from echo_infinity.cache import KV, Call
from echo_infinity.config import EchoConfig, ModelConfig, SamplerConfig, WindowConfig
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import Cache
from echo_infinity.noise import Noise, counter_noise
from echo_infinity.sampler import BlockSampler


def attach(
    transformer: Any,
    latent_size: tuple[int, int],
    *,
    memory: EvolvingMemory | None = None,
    window: WindowConfig | None = None,
    sampler: SamplerConfig | None = None,
    text_tokens: int = 512,
) -> Attached:
    """Let a ``WanTransformer3DModel`` stream: its self-attention reads the ring, the sink and the memory.

    Only the processors of its self-attention change, through ``set_attn_processor``; weights, cross-attention, forward
    and configuration stay the model's own. While attached it serves the streams of the returned object and nothing
    else.

    Args:
        transformer: a text-to-video model (``in_channels == out_channels``, no image embedding).
        latent_size: rows and columns of the latents.
        memory: as wide as the model, with as many heads; None streams with window and sink alone.
        window: what attention sees; default the official one.
        sampler: denoising steps; default the official ones.
        text_tokens: that a prompt's embeddings are padded to with zeros.

    Raises:
        ValueError: another kind of model, one that is attached already, or a geometry that can't stream.

    Source: docs/method.md sections 2 to 5.
    """
    c = transformer.config
    if c.image_dim is not None or c.added_kv_proj_dim is not None or c.in_channels != (c.out_channels or c.in_channels):
        raise ValueError(
            f"only text-to-video models stream: this one has image_dim {c.image_dim}, in_channels {c.in_channels}, "
            f"out_channels {c.out_channels}"
        )
    if any(isinstance(p, _Processor) for p in transformer.attn_processors.values()):
        raise ValueError("the transformer is attached already: detach it first")
    config = EchoConfig(
        name="diffusers",
        model=ModelConfig(
            width=c.num_attention_heads * c.attention_head_dim,
            heads=c.num_attention_heads,
            layers=c.num_layers,
            ffn=c.ffn_dim,
            latent_channels=c.in_channels,
            text_tokens=text_tokens,
            text_width=c.text_dim,
            time_width=c.freq_dim,
            patch=tuple(c.patch_size),
            eps=c.eps,
        ),
        latent_rows=latent_size[0],
        latent_columns=latent_size[1],
        window=window or WindowConfig(),
        memory=None if memory is None else memory.config,
        sampler=sampler or SamplerConfig(),
    )
    return Attached(transformer, config, memory)


class Attached:
    """An attached transformer; as a context manager it detaches at the end.

    Args:
        transformer: the model.
        config: how it streams; made by :func:`attach`.
        memory: the memory's weights, or None.
    """

    def __init__(self, transformer: Any, config: EchoConfig, memory: EvolvingMemory | None) -> None:
        self.transformer, self.config = transformer, config
        self._before: dict[str, Any] | None = dict(transformer.attn_processors)
        self._now = _Now()
        stand_in: Any = _StandIn(transformer, self._now, config.model.text_tokens)
        self.generator = Generator(config, stand_in, memory)
        mine = {
            name: _Processor(self._now, int(name.split(".")[1])) if name.endswith("attn1.processor") else processor
            for name, processor in self._before.items()
        }
        transformer.set_attn_processor(mine)  # last: whatever is refused before changes nothing

    def stream(self, embeddings: Tensor, *, seed: int = 0, noise: Noise | None = None) -> BlockSampler:
        """Start a stream of latent blocks; any number may run on one model.

        Args:
            embeddings: ``(B, n, text_dim)`` of the prompt, ``n <= text_tokens``, on any device.
            seed: of the noise.
            noise: the caller's own instead, see :mod:`echo_infinity.noise`.

        Returns:
            Its ``next_block`` gives ``(B, F, C, h, w)`` latents for ever; ``switch`` takes :meth:`text` of a new
            prompt.

        Raises:
            ValueError: embeddings of another shape, or the model is detached.
        """
        if self._before is None:
            raise ValueError("the transformer is detached: attach it again")
        text = self.text(embeddings)
        # The transformer's own forward can't be told to work on fixed tensors, so its calls are not captured.
        return BlockSampler(self.generator, text, noise or counter_noise(seed), batch=len(embeddings), graphs=False)

    def text(self, embeddings: Tensor) -> Any:
        """Return a prompt's embeddings as this model's streams take them.

        Raises:
            ValueError: another shape.
        """
        m = self.config.model
        if embeddings.ndim != 3 or embeddings.shape[1] > m.text_tokens or embeddings.shape[2] != m.text_width:
            raise ValueError(
                f"embeddings must be (B, <= {m.text_tokens}, {m.text_width}), got {tuple(embeddings.shape)}"
            )
        return nnf.pad(embeddings.to(self.generator.device), (0, 0, 0, m.text_tokens - embeddings.shape[1]))

    def detach(self) -> None:
        """Give the model back exactly as it was; its streams can't go on."""
        if self._before is not None:
            self.transformer.set_attn_processor(dict(self._before))
            self._before = None

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class _Now:
    """The call in work, for the processors, which are not told."""

    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.call: Call | None = None
        self.memory: list[KV] | None = None


class _Processor:
    """Self-attention of one block of the transformer on the stream's cache."""

    def __init__(self, now: _Now, layer: int) -> None:
        self._now, self._layer = now, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        now = self._now
        if now.cache is None or now.call is None:
            raise RuntimeError("the transformer is attached to a stream: detach it before calling it on its own")
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        memory = None if now.memory is None else now.memory[self._layer]
        norms = attn.norm_q.weight, attn.norm_k.weight
        out = now.cache.attend(self._layer, q, k, v, norms, now.call, memory)
        assert out is not None
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class _StandIn:
    """What the sampler calls instead of a :class:`CausalDiT`."""

    def __init__(self, transformer: Any, now: _Now, text_tokens: int) -> None:
        self._transformer, self._now = transformer, now
        self.head = SimpleNamespace(head=transformer.proj_out)
        self.text_tokens = text_tokens

    def condition(self, t: Tensor) -> Tensor:
        """The transformer embeds timesteps itself."""
        return t

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        cache: Cache,
        call: Call,
        memory: list[KV] | None = None,
        *,
        output: bool = True,
    ) -> Tensor | None:
        """One pass; ``output=False`` costs as much as any, since the transformer always runs to its end."""
        now, dtype = self._now, self._transformer.proj_out.weight.dtype
        now.cache, now.call, now.memory = cache, call, memory
        try:
            flow = self._transformer(
                hidden_states=x.to(dtype).transpose(1, 2),
                timestep=t[:, 0].expand(len(x)),
                encoder_hidden_states=text.to(dtype).expand(len(x), -1, -1),
                return_dict=False,
            )[0]
        finally:
            now.cache = now.call = now.memory = None
        return flow.transpose(1, 2) if output else None
