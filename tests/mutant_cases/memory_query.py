"""Tokens of several warps, normed and turned, with gaps between their heads."""

from test_memory_kernel import assert_reads, make


def run() -> None:
    assert_reads(make((2, 4, (3, 5), 5, 64), strided=True, rope=True))
