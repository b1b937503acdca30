"""Adapters: they start as nothing, train alone, and merge into plain weights."""

import pytest
import torch
from echo_infinity.model import CausalDiT
from echo_infinity.training.lora import LoRALinear, add_lora, merge_lora, peft_names
from numerics import assert_golden, assert_same_bits
from torch import nn


@pytest.fixture
def dit(student):
    torch.manual_seed(0)
    return CausalDiT(student.config.model)


def test_an_adapter_starts_as_nothing_and_then_adds_its_product():
    base = nn.Linear(6, 4)
    x, plain = torch.randn(3, 6), nn.Linear(6, 4)
    plain.load_state_dict(base.state_dict())
    lora = LoRALinear(base, rank=2, alpha=6.0)
    assert_same_bits(lora(x), plain(x))
    nn.init.normal_(lora.lora_b)
    expected = plain(x) + 3 * x @ lora.lora_a.T @ lora.lora_b.T
    assert_golden(lora(x), expected)


def test_all_ten_linears_of_every_block_and_nothing_else_is_trained(dit):
    names = set(dit.state_dict())
    add_lora(dit, 3, 3.0)
    trained = sorted(name for name, x in dit.named_parameters() if x.requires_grad)
    linears = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    assert trained == sorted(f"blocks.{b}.{n}.lora_{x}" for b in range(2) for n in linears for x in "ab")
    assert names <= set(dit.state_dict())


def test_merged_weights_compute_the_same(dit, student):
    add_lora(dit, 3, 1.5)
    for name, x in dit.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(x, std=0.1)
    plain = CausalDiT(student.config.model)
    plain.load_state_dict(merge_lora(dit.state_dict(), scale=0.5))
    for merged, adapted in zip(plain.layers(), dit.layers(), strict=True):
        x = torch.randn(1, 5, 24)
        assert_golden(merged.ffn(x), adapted.ffn(x))
        assert_golden(merged.cross_attn.encode(x)[0], adapted.cross_attn.encode(x)[0])
        assert_golden(
            merged.project(x, *torch.ones(2, 1, 1, 1, 24))[2], adapted.project(x, *torch.ones(2, 1, 1, 1, 24))[2]
        )


def test_peft_names(dit):
    add_lora(dit, 2, 2.0)
    named = peft_names(dit.state_dict())
    assert len(named) == 2 * 2 * 10
    assert named["base_model.model.blocks.1.ffn.0.lora_A.weight"].shape == (2, 24)
    assert named["base_model.model.blocks.0.self_attn.q.lora_B.weight"].shape == (24, 2)


def test_a_rank_of_nothing_is_refused(dit):
    with pytest.raises(ValueError, match="rank of an adapter must be at least 1, got 0"):
        add_lora(dit, 0, 1.0)
