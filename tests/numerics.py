"""The one tolerance policy. Nothing else in tests/ writes an atol."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

# How far one rounding of the output may move a value near 1: the floor under every comparison.
_UNIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# Against the golden files, float32: absolute, except that a gradient's is relative to the tensor's largest value.
# The residual + sink-anchor variant amplifies rounding: two readings of it differ by 1.5e-5, of the others by 6e-6.
_GOLDEN = {"value": 2e-5, "residual_sink_anchor": 5e-5, "gradient": 1e-5}

# A codec fed chunk by chunk against the whole video at once: same sums, other shapes, so other summation orders.
STREAM_TOLERANCE = 1e-5

# The same weights in a library that no one here wrote, float32: absolute, for values of about 1.
_LIBRARY = 1e-5

# A rollout with weights or cache in e4m3 against the one in full: root mean square, relative. For weights one rounding
# of e4m3; of cached keys and values attention averages the roundings away, to a sixteenth of that.
_FP8 = {"weights": 1 / 16, "cache": 1 / 256}

# Float32 sums and ex2 of an instruction, whose order and rounding the hardware chooses; of the largest value.
_INSTRUCTION = 1e-5


def assert_no_worse_than(actual: Tensor, budget: Tensor, oracle: Tensor, *, factor: float = 2.0) -> None:
    """Check that ``actual`` (kernel) errs at most ``factor`` times what ``budget`` (PyTorch, same dtype) does.

    Both errors are against ``oracle``, the reference run in float64 on the same rounded inputs.
    """
    assert actual.dtype == budget.dtype
    assert actual.shape == budget.shape == oracle.shape
    assert torch.isfinite(actual).all(), "kernel left non-finite values"
    exact = oracle.double()
    error = _max_abs(actual.double() - exact)
    allowed = factor * _max_abs(budget.double() - exact) + _UNIT[actual.dtype] * _max_abs(exact)
    assert error <= allowed, f"max error {error:.3e} > allowed {allowed:.3e}"


def assert_golden(
    actual: Tensor, expected: Tensor, kind: Literal["value", "residual_sink_anchor", "gradient"] = "value"
) -> None:
    """Check ``actual`` against a golden tensor of the same shape.

    ``kind`` is "gradient" for gradients, "residual_sink_anchor" for flow and memory state of the variant with
    residual gate and sink anchor, "value" for everything else.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, golden {tuple(expected.shape)}"
    _assert_within(actual, expected, _GOLDEN[kind] * (_max_abs(expected) if kind == "gradient" else 1.0))


def assert_stream_equal(actual: Tensor, expected: Tensor) -> None:
    """Check what came out chunk by chunk against the whole at once."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, whole {tuple(expected.shape)}"
    _assert_within(actual, expected, STREAM_TOLERANCE)


def assert_library_equal(actual: Tensor, expected: Tensor) -> None:
    """Check against what another library computed, or made of weights, in float32."""
    assert actual.dtype == expected.dtype == torch.float32
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, the library's {tuple(expected.shape)}"
    _assert_within(actual, expected, _LIBRARY)


def assert_fp8_close(actual: Tensor, expected: Tensor, kind: Literal["weights", "cache"]) -> None:
    """Check a rollout whose weights, or whose cache alone, are in eight bits against the one in full."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    size = expected.double().square().mean().sqrt().item()
    assert difference <= _FP8[kind] * size, f"root mean square error {difference / size:.3e} > {_FP8[kind]:.3e}"


def assert_sum_equal(actual: Tensor, expected: Tensor) -> None:
    """Check what a tensor core or the special function unit computed against exact arithmetic, rounded once."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    _assert_within(actual, expected, _INSTRUCTION * _max_abs(expected))


def assert_same_bits(actual: Any, expected: Any, where: str = "") -> None:
    """Check tensors, or nested mappings and sequences of them, bit for bit: for moves and for resume."""
    at = f" at {where}" if where else ""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{type(actual).__name__}{at}, expected a tensor"
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (
            f"{actual.dtype} {tuple(actual.shape)}{at}, expected {expected.dtype} {tuple(expected.shape)}"
        )
        wrong = (_bytes(actual) != _bytes(expected)).any(dim=-1)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements differ{at}"
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"keys {list(actual)}{at}, expected {list(expected)}"
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        assert len(actual) == len(expected), f"{len(actual)} items{at}, expected {len(expected)}"
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(*pair, f"{where}[{i}]")
    else:
        assert actual == expected, f"{actual!r}{at}, expected {expected!r}"


def _bytes(x: Tensor) -> Tensor:
    """(elements, bytes each): so that NaN equals NaN and 0.0 differs from -0.0."""
    flat = x.detach().cpu().contiguous().reshape(-1, 1)
    return flat.view(torch.uint8)


def _assert_within(actual: Tensor, expected: Tensor, allowed: float) -> None:
    error = _max_abs(actual.detach().double() - expected.double())
    assert error <= allowed, f"max error {error:.3e} > allowed {allowed:.3e}"  # NaN fails too


def _max_abs(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
