"""An endless procedural video with known truth: a pure function of (description, seed, frame)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .colours import COLOUR_NAMES, LOOKS
from .curtain import BlockSchedule, RandomSchedule, Schedule, closedness, time_to_open
from .grammar import KINDS, MAX_OBJECTS, SHAPES, SIZES, SPEEDS, Description, NamedObject, compose, parse
from .motion import ENTRY_SPEED, SINK_FRAMES, SIZE, ObjectSpec, centres
from .render import background, curtain_edges, draw_curtain, object_coverage

FPS = 16
_RADII = {"small": (6.0, 7.2), "medium": (7.8, 9.0), "large": (9.6, 11.0)}
_SPEEDS = {  # pixels a frame
    "curtain": {"slowly": (0.03, 0.06), None: (0.08, 0.14), "quickly": (0.20, 0.30)},
    "open": {"slowly": (0.10, 0.15), None: (0.20, 0.30), "quickly": (0.40, 0.55)},
    "path": {"slowly": (0.80, 1.00), None: (1.15, 1.45), "quickly": (1.65, 2.00)},
}
_LATE = 0.4  # share of objects that come in later, where others stay in sight all along
_NUMBER_ODDS = (0.5, 0.32, 0.18)  # of 1, 2, 3 objects where the prompt leaves it open


@dataclass(frozen=True)
class ObjectTruth:
    """One object in one frame: its looks, its centre (x, y) and radius in pixels, and the share of it in sight."""

    colour: str
    shape: str
    centre: tuple[float, float]
    radius: float
    visible: float


@dataclass(frozen=True)
class World:
    """A scene with its objects and, in kind "curtain", its curtain's schedule."""

    description: Description
    look: str
    kind: str
    objects: tuple[ObjectSpec, ...]
    schedule: Schedule | None

    @classmethod
    def from_seed(
        cls,
        seed: int,
        kind: str | None = None,
        name_objects: bool = True,
        curtain_blocks: Sequence[bool] | None = None,
        repeat_from: int | None = None,
    ) -> World:
        """Return the world number ``seed``.

        Args:
            seed: any non-negative int.
            kind: "open", "path" or "curtain"; by default drawn from the seed.
            name_objects: whether the prompt names the objects' colours and shapes; sizes and the speed are
                then named half of the time.
            curtain_blocks: exact schedule, one flag a block (True: closed); by default random durations.
            repeat_from: first block of the part of ``curtain_blocks`` that repeats for ever; by default the last.

        Raises:
            ValueError: unknown kind, a schedule that is no schedule, or a schedule without a curtain.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        rng = np.random.default_rng([seed, 1])
        drawn_kind = KINDS[int(rng.integers(len(KINDS)))]
        look = list(LOOKS)[int(rng.integers(len(LOOKS)))]
        number = 1 + int(rng.choice(MAX_OBJECTS, p=_NUMBER_ODDS))
        colours, shapes = rng.permutation(len(COLOUR_NAMES)), rng.integers(len(SHAPES), size=MAX_OBJECTS)
        sizes, say = rng.integers(len(SIZES), size=MAX_OBJECTS), rng.random(MAX_OBJECTS + 1) < 0.5
        speed = SPEEDS[int(rng.integers(len(SPEEDS)))] if say[-1] else None
        named = tuple(
            NamedObject(COLOUR_NAMES[colours[i]], SHAPES[shapes[i]], SIZES[sizes[i]] if say[i] else None)
            for i in range(number)
        )
        description = Description(
            look, kind or drawn_kind, named if name_objects else None, speed if name_objects else None
        )
        return cls._build(description, seed, curtain_blocks, repeat_from)

    @classmethod
    def from_prompt(
        cls,
        prompt: str,
        seed: int = 0,
        curtain_blocks: Sequence[bool] | None = None,
        repeat_from: int | None = None,
    ) -> World:
        """Return a world that ``prompt`` describes; what it leaves unsaid is drawn from ``seed``.

        Raises:
            ValueError: the prompt has unknown words or the wrong form, or a schedule without a curtain.
        """
        return cls._build(parse(prompt), seed, curtain_blocks, repeat_from)

    @classmethod
    def _build(
        cls, description: Description, seed: int, blocks: Sequence[bool] | None, repeat_from: int | None
    ) -> World:
        schedule: Schedule | None = None
        if description.kind == "curtain":
            schedule = RandomSchedule(seed) if blocks is None else BlockSchedule(tuple(blocks), repeat_from)
        elif blocks is not None:
            raise ValueError(f"curtain_blocks given, but the kind is {description.kind!r}; use kind 'curtain'")
        rng = np.random.default_rng([seed, 2])
        named = description.objects
        if named is None:
            named = (NamedObject(),) * (1 + int(rng.choice(MAX_OBJECTS, p=_NUMBER_ODDS)))
        free = [c for c in rng.permutation(COLOUR_NAMES) if c not in {n.colour for n in named}]
        objects: list[ObjectSpec] = []
        for n in named:
            size = n.size or SIZES[int(rng.integers(len(SIZES)))]
            colour = n.colour or str(free.pop())
            shape = n.shape or SHAPES[int(rng.integers(len(SHAPES)))]
            objects.append(_place(rng, colour, shape, size, description, objects))
        return cls(description, description.look, description.kind, tuple(objects), schedule)

    @property
    def prompt(self) -> str:
        """The prompt that says what the description says."""
        return compose(self.description)

    @cached_property
    def _background(self) -> np.ndarray:
        return background(LOOKS[self.look])

    def render(self, start: int, count: int) -> torch.Tensor:
        """Return ``count`` pixel frames from frame ``start`` on.

        Returns:
            ``(count, 3, 64, 64)`` uint8 RGB.

        Raises:
            ValueError: ``start`` or ``count`` is negative.
        """
        frames = _frames(start, count)
        canvas = np.broadcast_to(self._background, (count, 3, SIZE, SIZE)).astype(np.float32)
        for spec in self.objects:
            cover = object_coverage(spec, centres(spec, self.kind, self.schedule, frames))
            cover.paint(canvas, spec.colour)
        if self.schedule is not None:
            draw_curtain(canvas, closedness(self.schedule, frames), time_to_open(self.schedule, frames))
        return torch.from_numpy((canvas + 0.5).astype(np.uint8))

    def curtain(self, frame: int) -> float:
        """Return how far the curtain is closed: 0 open (or no curtain) to 1 closed."""
        return 0.0 if self.schedule is None else float(closedness(self.schedule, _frames(frame, 1))[0])

    def curtains(self, start: int, count: int) -> torch.Tensor:
        """Return ``(count,)`` float64 ``curtain`` values from frame ``start`` on."""
        frames = _frames(start, count)
        return torch.from_numpy(np.zeros(count) if self.schedule is None else closedness(self.schedule, frames))

    def masks(self, frame: int) -> torch.Tensor:
        """Return the pixels that show each object and nothing else (soft edges, less than 90 % covered, left out).

        Returns:
            ``(n_objects, 64, 64)`` bool; no pixel belongs to two objects.
        """
        cover = self._coverage(frame)
        visible = cover >= 0.9
        for i in range(len(self.objects)):
            visible[i] &= (cover[i + 1 :] < 0.1).all(0)
        if self.schedule is not None:
            left, right = curtain_edges(closedness(self.schedule, _frames(frame, 1)))
            column = np.arange(SIZE)
            visible &= ((column >= left[0]) & (column < right[0]))[None, None, :]
        return torch.from_numpy(visible)

    def truth(self, frame: int) -> list[ObjectTruth]:
        """Return what is known of every object at a frame, in sight or not."""
        seen = self.masks(frame).flatten(1).sum(1).tolist()
        result = []
        for spec, pixels in zip(self.objects, seen, strict=True):
            x, y = centres(spec, self.kind, self.schedule, _frames(frame, 1))[0]
            middle = np.array([[SIZE / 2, SIZE / 2]])
            whole = int((object_coverage(spec, middle).dense() >= 0.9).sum())
            share = min(1.0, pixels / whole)
            result.append(ObjectTruth(spec.colour, spec.shape, (float(x), float(y)), spec.radius, share))
        return result

    def in_sight(self, start: int, count: int) -> torch.Tensor:
        """Return whether any part of each object's bounding box shows in each frame; cheap, ignores other objects.

        Returns:
            ``(count, n_objects)`` bool.
        """
        frames = _frames(start, count)
        left, right = np.zeros(count), np.full(count, float(SIZE))
        if self.schedule is not None:
            left, right = curtain_edges(closedness(self.schedule, frames))
        shown = []
        for spec in self.objects:
            x, y = centres(spec, self.kind, self.schedule, frames).T
            r = spec.radius
            shown.append((x + r > left) & (x - r < right) & (y + r > 0) & (y - r < SIZE) & (left < right))
        return torch.from_numpy(np.stack(shown, 1))

    def _coverage(self, frame: int) -> np.ndarray:
        frames = _frames(frame, 1)
        return np.stack(
            [object_coverage(s, centres(s, self.kind, self.schedule, frames)).dense()[0] for s in self.objects]
        )


def _frames(start: int, count: int) -> np.ndarray:
    if start < 0 or count < 0:
        raise ValueError(f"start {start} and count {count} must not be negative; frames begin at 0")
    return np.arange(start, start + count, dtype=np.int64)


def _place(
    rng: np.random.Generator, colour: str, shape: str, size: str, description: Description, others: list[ObjectSpec]
) -> ObjectSpec:
    radius = float(rng.uniform(*_RADII[size]))
    path = description.kind == "path"
    speed = float(rng.uniform(*_SPEEDS[description.kind][description.speed]))
    low, high = radius + 1.0, SIZE - radius - 1.0
    tries = rng.uniform(low, high, size=(16, 2))
    if others:  # the try farthest from the others, so that objects seldom hide each other
        axes = slice(0, 2) if description.kind == "curtain" else slice(1, 2)
        taken = np.array([o.place for o in others])
        gaps = np.linalg.norm((tries[:, None] - taken)[..., axes], axis=-1).min(1)
        place = tries[int(gaps.argmax())]
    else:
        place = tries[0]
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if path:
        velocity = (sign * speed, float(rng.uniform(-0.12, 0.12)))
    else:
        angle = float(rng.uniform(-0.35, 0.35) if description.kind == "open" else rng.uniform(0, 2 * np.pi))
        velocity = (sign * speed * float(np.cos(angle)), speed * float(np.sin(angle)))
    delay = SINK_FRAMES + 1 + float(rng.uniform(0, 18))
    if description.kind == "open":
        if others and rng.random() < _LATE:
            delay = SINK_FRAMES + 1 + float(rng.uniform(0, 48))
        else:  # in long before the video begins, and since then anywhere on its way
            delay = -(low + radius) / ENTRY_SPEED - float(rng.uniform(0, 2)) * (high - low) / abs(velocity[0])
    return ObjectSpec(colour, shape, size, radius, (float(place[0]), float(place[1])), velocity, delay)
