"""linear: a product of another library is the same layer, with and without GELU, gradient, autocast and compiler."""

import pytest
import torch
from numerics import assert_no_worse_than, assert_same_bits
from torch.nn import functional as F

from echo_ext import linear
from echo_ext.linear import _pays

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
# (rows, K, N): one row; below and above the size from which float32 changes its library; a strided batch.
SHAPES = [((1,), 16, 3), ((7,), 33, 65), ((2, 37), 256, 129), ((130,), 256, 256)]
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def make(rows, k, n, dtype=torch.float32, *, bias=True, requires_grad=False):
    drawn = torch.randn(*rows, k), torch.randn(n, k) / k**0.5, torch.randn(n) if bias else None
    return tuple(None if x is None else x.to(dtype).requires_grad_(requires_grad) for x in drawn)


def plain(x, weight, bias, gelu):
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def wide(tensors):
    return [None if x is None else x.detach().double() for x in tensors]


@pytest.mark.parametrize("gelu", [False, True], ids=["alone", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_is_the_layer(shape, dtype, bias, gelu):
    args = make(*shape, dtype, bias=bias)
    assert_no_worse_than(linear(*args, gelu=gelu), plain(*args, gelu), plain(*wide(args), gelu))


@pytest.mark.parametrize("gelu", [False, True], ids=["alone", "gelu"])
@torch.no_grad()
def test_takes_strided_rows(gelu):
    _, weight, bias = make((1,), 256, 256)
    x = torch.full((3, 60, 300), float("nan"))
    x[:, ::2, :256] = torch.randn(3, 30, 256)
    x = x[:, ::2, :256]
    exact = plain(*wide((x, weight, bias)), gelu)
    assert_no_worse_than(linear(x, weight, bias, gelu=gelu), plain(x, weight, bias, gelu), exact)


@onednn
@torch.no_grad()
def test_large_products_change_the_library_and_small_ones_do_not():
    large, small = make((130,), 256, 256)[:2], make((7,), 33, 65)[:2]
    assert _pays(*large, None, False)
    assert not _pays(*small, None, False)
    assert not _pays(large[0].double(), large[1].double(), None, False)


@pytest.mark.parametrize("gelu", [False, True], ids=["alone", "gelu"])
@pytest.mark.parametrize("which", range(3), ids=["x", "weight", "bias"])
def test_gradients_are_those_of_the_layer(which, gelu):
    args = make((130,), 256, 256)
    args[which].requires_grad_()
    ours, theirs = linear(*args, gelu=gelu), plain(*args, gelu)
    assert_same_bits(ours, theirs)
    grads = [torch.autograd.grad(y.square().sum(), args[which])[0] for y in (ours, theirs)]
    assert_same_bits(*grads)


@pytest.mark.parametrize("gelu", [False, True], ids=["alone", "gelu"])
@torch.no_grad()
def test_autocast_is_obeyed(gelu):
    args = make((130,), 256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(linear(*args, gelu=gelu), plain(*args, gelu))


@pytest.mark.parametrize("gelu", [False, True], ids=["alone", "gelu"])
@torch.no_grad()
def test_compiles_without_graph_break(gelu):
    args = make((130,), 256, 256)
    out = torch.compile(lambda *a: linear(*a, gelu=gelu), fullgraph=True, backend="aot_eager")(*args)
    assert_no_worse_than(out, plain(*args, gelu), plain(*wide(args), gelu))


@torch.no_grad()
def test_no_rows_are_no_work():
    _, weight, bias = make((1,), 16, 3, torch.bfloat16)
    assert linear(torch.empty(0, 16, dtype=torch.bfloat16), weight, bias, gelu=True).shape == (0, 3)
