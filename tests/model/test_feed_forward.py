"""The feed-forward: product and GELU in one call change nothing but speed."""

import pytest
import torch
from echo_infinity.config import preset
from echo_infinity.model import Block, FeedForward, Linear
from numerics import assert_no_worse_than
from torch import nn

WIDTH, HIDDEN = 256, 1024  # large enough for the library that fuses


@pytest.fixture
def ffn():
    return FeedForward(Linear(WIDTH, HIDDEN), nn.GELU(approximate="tanh"), Linear(HIDDEN, WIDTH))


def plain(ffn, x):
    """Layer after layer, each through PyTorch's own."""
    up, gelu, down = ffn
    return nn.functional.linear(gelu(nn.functional.linear(x, up.weight, up.bias)), down.weight, down.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_matches_the_separate_layers(ffn, dtype):
    x = torch.randn(1, 37, WIDTH).mul(3).to(dtype)
    ffn.to(dtype)
    budget = plain(ffn, x)
    assert_no_worse_than(ffn(x), budget, plain(ffn.double(), x.double()))


def test_gradients_reach_both_layers(ffn):
    ffn(torch.randn(1, 5, WIDTH)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ffn.parameters())


@torch.no_grad()
def test_a_layer_that_replaces_the_linear_is_called(ffn):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ffn[0] = Doubled(WIDTH, HIDDEN)
    x = torch.randn(1, 5, WIDTH)
    assert torch.equal(ffn(x), nn.Sequential(*ffn)(x))


def test_blocks_are_made_of_them():
    block = Block(preset("tiny").model)
    assert type(block.ffn) is FeedForward
    layers = [block.ffn[0], block.ffn[2], block.self_attn.q, block.self_attn.o, block.cross_attn.k]
    assert all(type(layer) is Linear for layer in layers)
