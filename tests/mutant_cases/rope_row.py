"""Tokens normed and turned, as the kernels that are built on them see them."""

from mutant_cases.ring_append import run

__all__ = ["run"]
