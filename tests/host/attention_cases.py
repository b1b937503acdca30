"""Draws queries and tiers as views that lie between NaN, and holds an attention kernel against one float64 softmax."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from numerics import assert_no_worse_than
from torch import Tensor

from echo_ext import _native
from echo_ext.attention import frame_shift, stream_attention_ref

TIERS = ("sink", "memory", "ring")


class Case(NamedTuple):
    B: int
    Tq: int
    keys: tuple[int, int, int]  # of sink, memory and ring; 0 leaves the tier out
    H: int
    d: int
    shift: str = "shared"  # "", "shared" or "own": one a stream
    processors: int = 1  # few, so that blocks do several tiles and share some

    def __str__(self) -> str:
        keys = "+".join(map(str, self.keys))
        return f"B{self.B}-Tq{self.Tq}-Tk{keys}-H{self.H}-d{self.d}-{self.shift or 'still'}-{self.processors}p"


def inside(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A view ``(B, T, H, d)`` with a contiguous last dim, NaN all around it."""
    b, t, h, d = shape
    whole = {
        "ring": (b, t + 5, h, d),  # filled slots behind a sink, free slots after them
        "packed": (b, t + 1, 3, h, d),  # q, k and v side by side
        "heads first": (b, h, t + 3, d),
        "wide": (b, t, h + 1, d + 16),
    }[layout]
    buffer = torch.full(whole, float("nan"), dtype=dtype, device=device)
    if layout == "packed":
        return buffer[:, :t, 1]
    if layout == "heads first":
        return buffer[:, :, 2 : t + 2].transpose(1, 2)
    return buffer[:, 3 : t + 3] if layout == "ring" else buffer[:, :, :h, 8 : d + 8]


LAYOUTS = ("ring", "packed", "heads first", "wide")


def draw(case: Case, dtype: torch.dtype, layouts: Sequence[str] = LAYOUTS, device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments of the op. All scores are far below 0, the score of a key that isn't there."""

    def filled(tokens: int, layout: str, sign: int) -> Tensor:
        x = inside((case.B, tokens, case.H, case.d), layout, dtype, device)
        return x.copy_(sign * (torch.randn(x.shape).abs() + 0.5) if sign else torch.randn(x.shape))

    args: dict[str, Any] = {"q": filled(case.Tq, layouts[0], 1), "shift": None}
    for tier, tokens, layout in zip(TIERS, case.keys, layouts[1:], strict=True):
        if tokens:
            args[tier] = filled(tokens, layout, -1), filled(tokens, layout, 0)
    if case.shift:
        ids = torch.arange(case.B if case.shift == "own" else 1) + 1
        args["shift"] = frame_shift(ids, 0, case.d, device=device)
    return args


def one_softmax(
    q: Tensor, shift: Tensor | None = None, scale: float | None = None, **tiers: Any
) -> tuple[Tensor, Tensor]:
    """Oracle in float64: concatenate keys and values, turn the query by complex numbers. Returns output and LSE."""
    q, d = q.detach().double(), q.shape[-1]
    turned = q
    if shift is not None:
        n = shift.shape[1]
        pairs = torch.view_as_complex(q[..., : 2 * n].contiguous().unflatten(-1, (n, 2)))
        by = torch.view_as_complex(shift.double().contiguous())[:, None, None]
        turned = torch.cat([torch.view_as_real(pairs * by).flatten(-2), q[..., 2 * n :]], -1)
    given = [(q if tier == "ring" else turned, *tiers[tier]) for tier in TIERS if tier in tiers]
    scores = [x.transpose(1, 2) @ k.detach().double().permute(0, 2, 3, 1) for x, k, _ in given]
    scores = torch.cat(scores, -1) * (d**-0.5 if scale is None else scale)
    values = torch.cat([v.detach().double() for *_, v in given], 1).transpose(1, 2)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = (weights / weights.sum(-1, keepdim=True)) @ values
    return out.transpose(1, 2), scores.amax(-1) + weights.sum(-1).log()


def positional(args: dict[str, Any]) -> tuple[Any, ...]:
    """The op's own argument order."""
    q = args["q"]
    pairs = [x for tier in TIERS for x in args.get(tier) or (None, None)]
    return q, args["shift"], *pairs, q.shape[-1] ** -0.5


def check(backend: str, case: Case, dtype: torch.dtype, layouts: Sequence[str] = LAYOUTS, device: str = "cpu") -> None:
    """Run the op and hold output and LSE against the oracle, the error PyTorch makes being the budget."""
    args = draw(case, dtype, layouts, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "processors", lambda device: case.processors)
        out, lse = torch.ops.echo_ext.stream_attention(*positional(args), backend)
    exact, exact_lse = one_softmax(**args)
    budget, budget_lse = stream_attention_ref(*positional(args))
    assert_no_worse_than(out, budget, exact)
    assert_no_worse_than(lse, budget_lse, exact_lse)


# Lengths about the tiles: 64 or 32 keys and 128 or 64 queries before Hopper, 176 or 192 keys and 128 queries on it.
_KEYS = {"kernel_sm80": (1, 7, 31, 32, 33, 63, 64, 65, 97, 129), "kernel_sm90": (1, 64, 131, 175, 176, 177, 191, 193)}
_QUERIES = (1, 2, 17, 63, 64, 65, 127, 128, 129, 131)
_TYPES = {
    "kernel_sm80": (torch.bfloat16, torch.float16, torch.float32),
    "kernel_sm90": (torch.bfloat16, torch.float16),
}
_DIMS = {"kernel_sm80": (16, 16, 64, 16, 16, 128), "kernel_sm90": (64, 128)}


def random_case(backend: str, seed: int) -> tuple[Case, torch.dtype, tuple[str, ...]]:
    """Arguments of :func:`check`: any tiers, lengths, layouts; ``seed`` counts through dtypes and head dims."""
    rng = random.Random(f"{backend}{seed}")
    keys = [rng.choice((0, *_KEYS[backend])) for _ in TIERS]
    keys[rng.randrange(3)] += not any(keys)
    which, dtype = divmod(seed, len(_TYPES[backend]))
    case = Case(
        B=rng.choice((1, 1, 2)),
        Tq=rng.choice(_QUERIES),
        keys=(keys[0], keys[1], keys[2]),
        H=rng.randint(1, 3),
        d=_DIMS[backend][which % len(_DIMS[backend])],
        shift=rng.choice(("", "shared", "own")),
        processors=rng.randint(1, 2),
    )
    return case, _TYPES[backend][dtype], tuple(rng.choice(LAYOUTS) for _ in range(4))
