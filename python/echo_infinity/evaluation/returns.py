"""Did an object come back? Its colour, shape and place against what was seen before it went out of sight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from echo_infinity.evaluation.objects import Found, find_objects
from echo_infinity.worlds.curtain import hash64

LOOK_BACK = 4  # the last open frame but three is what was seen: the later ones may show the curtain coming
CLEAR = 0.6  # overlap with the best shape from which an object is worth asking for
NEAR = 8.0  # pixels between centres that still are the right place: half a token of the bundled model


@dataclass(frozen=True)
class Question:
    """What was in sight, and which of it is asked for; the others are there so that they aren't taken for it."""

    objects: tuple[Found, ...]
    target: int


@dataclass(frozen=True)
class Answer:
    """Whether the object came back in its colour, in its shape, at its place: each in most of the frames judged."""

    colour: bool
    shape: bool
    place: bool

    @property
    def all(self) -> bool:
        """Whether everything is right."""
        return self.colour and self.shape and self.place


def ask(objects: Sequence[Found], seed: int) -> Question | None:
    """Choose which of the objects in sight to ask for, by a hash of ``seed`` among the clear ones; None without any."""
    clear = [i for i, x in enumerate(objects) if x.fit >= CLEAR]
    if not clear:
        return None
    return Question(tuple(objects), clear[int(hash64(seed, np.array([1]))[0] % np.uint64(len(clear)))])


def judge_return(question: Question, frames: Sequence[Tensor]) -> Answer:
    """Compare frames after the return with what was seen before.

    Objects are matched by place alone, the nearest pair first, each at most once. So a scene full of colours is right
    no more often than chance, and an object that fails to return is wrong in everything.

    Args:
        question: what was in sight.
        frames: ``(3, 64, 64)`` uint8 each; an odd number.
    """
    wanted = question.objects[question.target]
    answers = []
    for frame in frames:
        found = match(question.objects, find_objects(frame))[question.target]
        answers.append(
            (False, False, False)
            if found is None
            else (found.colour == wanted.colour, found.shape == wanted.shape, distance(found, wanted) <= NEAR)
        )
    most = [sum(column) * 2 > len(frames) for column in zip(*answers, strict=True)]
    return Answer(*most)


def match(wanted: Sequence[Found], found: Sequence[Found]) -> list[Found | None]:
    """Give each wanted object one of those found, the nearest pair first; None where none is left."""
    pairs = sorted((distance(w, f), i, j) for i, w in enumerate(wanted) for j, f in enumerate(found))
    given: dict[int, int] = {}
    for _, i, j in pairs:
        if i not in given and j not in given.values():
            given[i] = j
    return [found[given[i]] if i in given else None for i in range(len(wanted))]


def distance(a: Found, b: Found) -> float:
    """Pixels between two centres."""
    return math.dist(a.centre, b.centre)
