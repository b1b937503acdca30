"""Rows of several warps, as the kernels that are built on them see them."""

from mutant_cases import modulate, ring_append


def run() -> None:
    modulate.run()
    ring_append.run()
