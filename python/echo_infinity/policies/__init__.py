"""Policies to compare: what attention sees, and what happens to a frame that leaves the window.

Each is one file with one class, listed in :data:`POLICIES`; sampler, saved streams and training take any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from echo_infinity.cache import KV
from echo_infinity.generator import Generator
from echo_infinity.noise import Noise
from echo_infinity.policies.ema import MovingAverage
from echo_infinity.policies.evolving import Evolving
from echo_infinity.policies.frozen import Frozen
from echo_infinity.policies.full import FullAttention
from echo_infinity.policies.policy import Policy
from echo_infinity.policies.pooled import MeanPooled
from echo_infinity.policies.rolling import RollingSink
from echo_infinity.policies.sink import SinkWindow
from echo_infinity.policies.window import WindowOnly
from echo_infinity.sampler import BlockSampler
from echo_infinity.weights import Checkpoint

__all__ = ["POLICIES", "Policy", "find_policy", "make_generator", "make_sampler"]

_ALL: tuple[Policy, ...] = (
    WindowOnly(),
    SinkWindow(),
    MovingAverage(),
    MeanPooled(),
    RollingSink(),
    Frozen(),
    Evolving(),
    FullAttention(),
)
POLICIES: Mapping[str, Policy] = MappingProxyType({policy.name: policy for policy in _ALL})
"""Every policy by name, from the least to the most that it keeps."""


def find_policy(name: str) -> Policy:
    """Return the policy of that name.

    Raises:
        ValueError: there is none; lists the names.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]


def make_generator(checkpoint: Checkpoint, policy: str | None = None, *, kv: str = "full") -> Generator:
    """Return what the streams of a model under a policy share.

    Args:
        checkpoint: the model.
        policy: its name; by default the one that the model was trained under.
        kv: how streams keep keys and values, "full" or "fp8".

    Raises:
        ValueError: unknown policy, or the model can't run under it.
    """
    own = checkpoint.config.policy
    if policy is None and own == "evolving" and checkpoint.memory is None:
        return Generator(checkpoint.config, checkpoint.model, None, kv=kv)
    chosen = find_policy(own if policy is None else policy)
    config = chosen.configure(checkpoint.config)
    return Generator(config, checkpoint.model, chosen.module(checkpoint.memory), chosen.recall, kv=kv)


def make_sampler(
    checkpoint: Checkpoint,
    policy: str | None,
    text: list[KV],
    noise: Noise,
    batch: int = 1,
    *,
    memory_dtype: torch.dtype | None = None,
) -> BlockSampler:
    """Start a stream of latent blocks, or a batch of them in step, under a policy.

    Args:
        checkpoint: the model.
        policy: as in :func:`make_generator`.
        text: per layer K/V of the prompts, from :meth:`~echo_infinity.model.CausalDiT.encode_text`.
        noise: see :mod:`echo_infinity.noise`.
        batch: ``B``.
        memory_dtype: of the evolving memory's state; default the weights'.

    Raises:
        ValueError: as :func:`make_generator`.
    """
    return BlockSampler(make_generator(checkpoint, policy), text, noise, batch, memory_dtype)
