"""The judges judged: every comparison in numerics.py fails where it must."""

import pytest
import torch
from numerics import assert_golden, assert_no_worse_than, assert_same_bits, assert_stream_equal


def test_uninitialised_memory_is_poisoned():
    x = torch.zeros(3)
    for fresh in (torch.empty(3), torch.empty_like(x), x.new_empty(3)):
        assert fresh.isnan().all()


def test_kernel_may_err_twice_as_much_as_pytorch_and_no_more():
    exact = torch.linspace(-1, 1, 11, dtype=torch.float64)
    budget = exact.float() + 1e-3
    assert_no_worse_than(exact.float() - 1.9e-3, budget, exact)
    with pytest.raises(AssertionError, match=r"max error 2\.1\d+e-03 > allowed 2\.0"):
        assert_no_worse_than(exact.float() - 2.1e-3, budget, exact)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_no_worse_than(torch.full((11,), float("nan")), budget, exact)


@pytest.mark.parametrize(
    ("kind", "passes", "fails"),
    [("value", 1.9e-5, 2.1e-5), ("residual_sink_anchor", 4.9e-5, 5.1e-5), ("gradient", 9.9e-3, 1.1e-2)],
)
def test_golden_tolerances(kind, passes, fails):
    golden = torch.tensor([1.0, -1000.0], dtype=torch.float64)
    assert_golden(golden + passes, golden, kind=kind)
    with pytest.raises(AssertionError, match="max error"):
        assert_golden(golden + fails, golden, kind=kind)
    with pytest.raises(AssertionError, match="shape"):
        assert_golden(golden[:1], golden, kind=kind)


@pytest.mark.parametrize("judge", [assert_golden, assert_stream_equal])
def test_nan_is_never_close(judge):
    with pytest.raises(AssertionError, match="max error nan"):
        judge(torch.tensor([0.0, float("nan")]), torch.zeros(2))


def test_same_bits_tells_zero_from_minus_zero_and_nan_from_none():
    nan = torch.tensor([float("nan"), 0.0])
    assert_same_bits({"a": [nan, 3]}, {"a": [nan.clone(), 3]})
    with pytest.raises(AssertionError, match=r"1 of 2 elements differ at \['a'\]\[0\]"):
        assert_same_bits({"a": [torch.tensor([float("nan"), -0.0])]}, {"a": [nan]})


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), "torch.float64"),
        (torch.zeros(2, 1), r"\(2, 1\)"),
        (None, "expected a tensor"),
    ],
    ids=["dtype", "shape", "type"],
)
def test_same_bits_rejects(actual, message):
    with pytest.raises(AssertionError, match=message):
        assert_same_bits(actual, torch.zeros(2))
    with pytest.raises(AssertionError, match="keys"):
        assert_same_bits({}, {"a": actual})
    with pytest.raises(AssertionError, match="0 items"):
        assert_same_bits([], [actual])
