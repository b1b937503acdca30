"""What the clips show that train the generator: kinds of worlds and schedules, drawn one recipe a clip."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..worlds import World

Odds = tuple[tuple[int, float], ...]
LOCAL_BLOCKS = 3  # the local window, 9 latent frames, the current block included


@dataclass(frozen=True)
class ClipMix:
    """What the clips show. ``Odds`` are pairs (number of blocks, weight).

    Args:
        curtain, random_curtain, path, open: weights of the kinds: curtain aligned to blocks, curtain with random
            durations, objects that leave along a path, objects that stay.
        unnamed: share of prompts that don't name the objects, by kind alike.
        wait: closed blocks at the start (block 0 holds the sink frames).
        sight: open blocks the first time.
        absence: closed blocks between sights. 2 is the least: the objects have then just left the local window.
        return_sight: open blocks every later time.
        lost: share of clips, paths excepted, of which the model is shown a part without the objects, as if its own
            rollout had lost them; what it is asked for has them still, so it learns to bring them back.
    """

    curtain: float = 0.7
    random_curtain: float = 0.1
    path: float = 0.1
    open: float = 0.1
    unnamed: float = 0.75
    wait: Odds = ((1, 0.7), (2, 0.3))
    sight: Odds = ((1, 0.5), (2, 0.5))
    absence: Odds = ((2, 0.55), (3, 0.35), (4, 0.1))
    return_sight: Odds = ((2, 0.75), (3, 0.25))
    lost: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                if value < 0:
                    raise ValueError(f"{field.name} must not be negative, got {value}")
            elif not value or any(blocks < 1 or weight < 0 for blocks, weight in value):
                raise ValueError(f"{field.name} must be pairs (blocks >= 1, weight >= 0), got {value}")
        if min(blocks for blocks, _ in self.absence) < LOCAL_BLOCKS - 1:
            raise ValueError(
                f"absence {self.absence} is shorter than {LOCAL_BLOCKS - 1} blocks: the objects would still be in "
                "the local window when the curtain opens"
            )

    def summary(self) -> str:
        """Say in a line what the clips show."""
        total = self.curtain + self.random_curtain + self.path + self.open
        closed = f"curtains closed for {self.absence[0][0]}-{self.absence[-1][0]} blocks"
        shares = {closed: self.curtain, "random curtains": self.random_curtain, "paths": self.path, "open": self.open}
        parts = [f"{share / total:.0%} {kind}" for kind, share in shares.items() if share]
        parts += [f"objects lost for a while in {self.lost:.0%} of all but paths"] if self.lost else []
        return ", ".join([*parts, f"{1 - self.unnamed:.0%} of prompts name the objects"])


SHORT_ABSENCE = ClipMix()
LONG_ABSENCE = ClipMix(absence=((2, 0.2), (3, 0.25), (4, 0.25), (5, 0.15), (6, 0.15)))
EVEN = ClipMix(
    curtain=0.3,
    open=0.5,
    unnamed=0.5,
    absence=((2, 0.15), (3, 0.2), (4, 0.2), (5, 0.15), (6, 0.1), (8, 0.1), (12, 0.1)),
)
NAMED = ClipMix(curtain=0.0, random_curtain=0.0, path=0.0, open=1.0, unnamed=0.1)
RECOVER = replace(
    EVEN,
    sight=((1, 0.4), (2, 0.4), (3, 0.1), (4, 0.04), (5, 0.03), (6, 0.02), (7, 0.01)),
    return_sight=((2, 0.6), (3, 0.28), (4, 0.05), (5, 0.03), (6, 0.02), (7, 0.01), (8, 0.01)),
    lost=0.4,
)
MIXES = {"short": SHORT_ABSENCE, "long": LONG_ABSENCE, "even": EVEN, "named": NAMED, "recover": RECOVER}


def draw_clip(seed: int, blocks: int, mix: ClipMix) -> dict[str, Any]:
    """Return the recipe of clip number ``seed``: kind, schedule and whether the prompt names the objects."""
    rng = np.random.default_rng([seed, 3])
    kinds = ("curtain", "random_curtain", "path", "open")
    weights = np.array([getattr(mix, kind) for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    recipe: dict[str, Any] = {"seed": seed, "kind": "curtain" if kind == "random_curtain" else kind}
    recipe["name_objects"] = bool(rng.random() >= mix.unnamed)
    recipe["curtain_blocks"] = None
    if kind == "curtain":
        closed = [True] * _draw(rng, mix.wait) + [False] * _draw(rng, mix.sight)
        while len(closed) < blocks:
            closed += [True] * _draw(rng, mix.absence) + [False] * _draw(rng, mix.return_sight)
        recipe["curtain_blocks"] = closed  # past the clip's end too, so that the last timer tells the truth
    recipe["lost"] = _draw_loss(seed, kind, blocks, mix.lost)
    return recipe


def _draw_loss(seed: int, kind: str, blocks: int, share: float) -> tuple[int, int] | None:
    """Return the blocks [first, end) that are shown without objects, if any."""
    rng = np.random.default_rng([seed, 4])
    if kind == "path" or rng.random() >= share:  # of a path the model can't tell objects that are away from lost ones
        return None
    first = int(rng.integers(max(1, blocks - 2)))
    return first, min(blocks, first + int(rng.integers(3, max(4, blocks + 1))))


def clip_world(recipe: dict[str, Any]) -> World:
    """Return the world a clip was rendered from, for its truth."""
    return World.from_seed(recipe["seed"], recipe["kind"], recipe["name_objects"], recipe["curtain_blocks"])


def _draw(rng: np.random.Generator, odds: Odds) -> int:
    weights = np.array([weight for _, weight in odds])
    return odds[int(rng.choice(len(odds), p=weights / weights.sum()))][0]
