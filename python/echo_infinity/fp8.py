"""Weights and cached keys and values in eight bits (e4m3), widened where they are used; half the memory of bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from echo_infinity.cache import KV, Call, RingKV
from echo_infinity.config import EchoConfig
from echo_infinity.model import CausalDiT

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
MODES = ("full", "fp8")


def narrow(x: Tensor, dim: int = -1) -> KV:
    """Round ``x`` to e4m3 codes with one float32 scale for each vector along ``dim``.

    Returns:
        Codes as uint8 in the shape of ``x`` (files and checks know no e4m3), and scales with ``dim`` of length 1.
    """
    wide = x.float()
    scale = (wide.abs().amax(dim, keepdim=True) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale).to(E4M3).view(torch.uint8), scale


def widen(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`narrow` rounded, in ``dtype``."""
    return (codes.view(E4M3).float() * scale).to(dtype)


def convert_cache(named: Mapping[str, Tensor], kv: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Saved tensors of a stream as one that keeps its cache the way ``kv`` says has them; others stay as they are."""
    found = dict(named)
    layers = 1 + max((int(name.split(".")[2]) for name in named if name.startswith("cache.k.")), default=-1)
    for name in [f"cache.{kind}.{i}" for kind in "kv" for i in range(layers - 1)]:
        if kv == "fp8" and name in found:
            found[f"{name}.codes"], found[f"{name}.scale"] = narrow(found.pop(name))
        elif kv == "full" and {f"{name}.codes", f"{name}.scale"} <= found.keys():
            found[name] = widen(found.pop(f"{name}.codes"), found.pop(f"{name}.scale"), dtype)
    return found


class Fp8Linear(nn.Module):
    """A linear layer whose weight is kept in e4m3 with a scale for each output, and widened for each product.

    Args:
        linear: the layer to replace.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = narrow(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nnf.linear(x, widen(self.codes, self.scale, x.dtype), self.bias)


def narrow_weights(model: CausalDiT) -> CausalDiT:
    """Replace every linear layer of the transformer blocks, in place; embeddings, norms and head stay as they are."""
    for block in model.layers():
        for module in list(block.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Fp8Linear(child))
    return model


class Fp8RingKV(RingKV):
    """A ring whose layers but the last are kept in e4m3, with a scale for each token and head.

    A call widens a layer's window into one buffer that all layers share, works on it as ever, and narrows what it
    wrote. The last layer stays in full: the memory is written from it.

    Args:
        config: geometry; sets slots, layers, heads.
        batch: ``B``.
        dtype: of keys and values in use.
        device: where the buffers live.
        heads: of the buffers; default the model's.
    """

    def __init__(
        self,
        config: EchoConfig,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        heads: int | None = None,
    ) -> None:
        super().__init__(config, batch, dtype, device, full_layers=2, heads=heads)
        narrowed = config.model.layers - 1
        shape = self.k[0].shape
        self._codes = [
            [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(narrowed)] for _ in range(2)
        ]
        self._scales = [[torch.ones(*shape[:3], 1, device=device) for _ in range(narrowed)] for _ in range(2)]
        shared, last = [x[0] for x in (self.k, self.v)], [x[-1] for x in (self.k, self.v)]
        self.k, self.v = ([s] * narrowed + [x] for s, x in zip(shared, last, strict=True))

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        call: Call,
        memory: KV | None,
        *,
        output: bool = True,
    ) -> Tensor | None:
        """Append and attend as :meth:`RingKV.attend` does."""
        narrowed = layer < len(self._codes[0])
        if narrowed:
            end = self._ring_end(call)
            for full, codes, scales in zip((self.k, self.v), self._codes, self._scales, strict=True):
                full[layer][:, :end] = widen(codes[layer][:, :end], scales[layer][:, :end], full[layer].dtype)
        out = super().attend(layer, q, k, v, norms, call, memory, output=output)
        if narrowed:
            for full, codes, scales in zip((self.k, self.v), self._codes, self._scales, strict=True):
                for first, stop in _runs(call.slots.write):
                    own = slice(first * self.tokens_per_frame, stop * self.tokens_per_frame)
                    codes[layer][:, own], scales[layer][:, own] = narrow(full[layer][:, own])
        return out

    def _whole_layer(self, layer: int) -> KV:
        if layer == len(self._codes[0]):
            return super()._whole_layer(layer)
        parts = (self._codes[0], self._scales[0]), (self._codes[1], self._scales[1])
        k, v = (widen(codes[layer], scales[layer], self.k[-1].dtype) for codes, scales in parts)
        return k, v

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer by name, for saving and forking."""
        last = len(self.k) - 1
        named = {f"k.{last}": self.k[last], f"v.{last}": self.v[last]}
        for kind, codes, scales in zip("kv", self._codes, self._scales, strict=True):
            named |= {f"{kind}.{i}.codes": x for i, x in enumerate(codes)}
            named |= {f"{kind}.{i}.scale": x for i, x in enumerate(scales)}
        return named if self.raw is None else named | {"raw": self.raw}


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring slots, as ``(first, stop)``: a block's are one run, or two where the ring wraps."""
    edges = [i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1]
    return [(slots[a], slots[b - 1] + 1) for a, b in zip([0, *edges], [*edges, len(slots)], strict=True)]
