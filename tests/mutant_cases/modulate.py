"""Tokens of several warps that fill their last vector's warp partly, in buffers with gaps that nobody may touch."""

from test_norm import ARGUMENTS, assert_op, make


def run() -> None:
    for case in ARGUMENTS:
        assert_op(case, make((2, 2, 2, 264), strided=True), backend="kernel")
