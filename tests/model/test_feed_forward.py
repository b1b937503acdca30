"""The feed-forward: the library's fused GELU changes nothing but speed."""

import pytest
import torch
from echo_infinity.config import preset
from echo_infinity.model import Block, FeedForward, _fuses_gelu
from numerics import assert_no_worse_than
from torch import nn

WIDTH, HIDDEN = 256, 1024  # large enough to be fused


@pytest.fixture
def ffn():
    return FeedForward(nn.Linear(WIDTH, HIDDEN), nn.GELU(approximate="tanh"), nn.Linear(HIDDEN, WIDTH))


def plain(ffn, x):
    return nn.Sequential(*ffn)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_fused_matches_the_separate_layers(ffn, dtype):
    x = torch.randn(1, 37, WIDTH).mul(3).to(dtype)
    ffn.to(dtype)
    budget = plain(ffn, x)
    assert_no_worse_than(ffn(x), budget, plain(ffn.double(), x.double()))


def test_gradients_take_the_separate_layers(ffn):
    x = torch.randn(1, 5, WIDTH)
    assert not _fuses_gelu(x, ffn[0])
    ffn(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ffn.parameters())


@torch.no_grad()
def test_a_layer_that_replaces_the_linear_is_called(ffn):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ffn[0] = Doubled(WIDTH, HIDDEN)
    x = torch.randn(1, 5, WIDTH)
    assert torch.equal(ffn(x), plain(ffn, x))


@torch.no_grad()
def test_blocks_fuse_where_the_library_can(ffn):
    assert type(Block(preset("tiny").model).ffn) is FeedForward
    assert _fuses_gelu(torch.randn(1, 5, WIDTH), ffn[0]) == torch.backends.mkldnn.is_available()
