"""Low-rank adapters on all linears of a DiT's blocks; official names stay, and adapters come in PEFT's layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from echo_infinity.model import CausalDiT

_A, _B = "lora_a", "lora_b"


class LoRALinear(nn.Linear):
    """``W x + b + (alpha / rank) B A x`` with W and b frozen; A starts random, B at zero.

    Args:
        base: the linear; its weight and bias are taken over.
        rank: of the adapter.
        alpha: its strength times ``rank``.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        like, down = base.weight, torch.randn(rank, base.in_features) / base.in_features**0.5
        self.lora_a = nn.Parameter(down.to(like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank).to(like))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * nnf.linear(nnf.linear(x, self.lora_a), self.lora_b)


def add_lora(model: CausalDiT, rank: int, alpha: float) -> None:
    """Freeze a DiT and put an adapter on every linear of its blocks, in place.

    Raises:
        ValueError: the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, got {rank}")
    model.requires_grad_(False)
    for block in model.layers():
        for name, child in list(block.named_modules()):
            if isinstance(child, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, LoRALinear(child, rank, alpha))


def merge_lora(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return a plain DiT's tensors: every adapter added to its weight.

    Args:
        state: tensors of a DiT with adapters, by name.
        scale: ``alpha / rank``.
    """
    merged = {name: x for name, x in state.items() if not name.endswith((_A, _B))}
    for name, a in state.items():
        if name.endswith(_A):
            base = name.removesuffix(_A)
            wide = torch.promote_types(a.dtype, torch.float32)
            delta = scale * state[base + _B].to(wide) @ a.to(wide)
            merged[f"{base}weight"] = (merged[f"{base}weight"].to(wide) + delta).to(a.dtype)
    return merged


def peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters alone under PEFT's names, ``base_model.model.blocks.0.self_attn.q.lora_A.weight``."""
    names = {_A: "lora_A.weight", _B: "lora_B.weight"}
    return {
        f"base_model.model.{name.rpartition('.')[0]}.{names[name.rpartition('.')[2]]}": x
        for name, x in state.items()
        if name.endswith((_A, _B))
    }
