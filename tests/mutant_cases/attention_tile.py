"""As for the kernel that is built on it: tails of queries and of every tier, tiles that are shared."""

from mutant_cases.attention_core import run

__all__ = ["run"]
