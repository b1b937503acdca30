"""Prompt: do the objects and the scene that a prompt names show, and how soon after the prompt changes?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from echo_infinity.evaluation.journal import Journal, Row
from echo_infinity.evaluation.objects import find_objects
from echo_infinity.evaluation.recall import check_worlds
from echo_infinity.evaluation.sampling import Rollout
from echo_infinity.evaluation.scenes import scene_of
from echo_infinity.evaluation.stats import Share
from echo_infinity.weights import Checkpoint
from echo_infinity.worlds import World, block_start
from echo_infinity.worlds.grammar import NamedObject, parse

SETTLE = 5.0  # seconds by which the real worlds' objects have come in
_EVERY = 8  # frames: twice a second
_HELD = 4  # judged frames in a row, two seconds, of which three must be right for a switch to count as done
_KINDS = ("truth", "chance", "steady", "switch")


@dataclass(frozen=True)
class PromptTest:
    """What is asked.

    Args:
        rollouts: prompts, each of a held-out open world that names its objects.
        seconds: of each video before the switch and, again, after it.
        seed: of the first world and its noise.
        batch: rollouts side by side.

    Raises:
        ValueError: the videos end before the objects have come in, or a number is below 1.
    """

    rollouts: int = 256
    seconds: float = 20.0
    seed: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        if self.seconds <= SETTLE:
            raise ValueError(f"seconds must be more than {SETTLE:g}, by when objects have come in, got {self.seconds}")
        if min(self.rollouts, self.batch) < 1:
            raise ValueError(f"prompt needs at least 1 rollout and batches of 1, got {self}")

    def settings(self) -> Row:
        """What a rollout's result depends on beside its number."""
        return {"seed": self.seed, "seconds": self.seconds, "batch": self.batch}


@dataclass(frozen=True)
class Seen:
    """What of a prompt a frame shows: every named colour, each with its shape; no other object; the scene."""

    colours: bool
    shapes: bool
    alone: bool
    scene: bool

    @property
    def all(self) -> bool:
        """Whether all that is named shows, and nothing else."""
        return self.colours and self.shapes and self.alone and self.scene


@dataclass(frozen=True)
class Adherence:
    """Rollouts in most of whose frames the attribute is right."""

    kind: str
    colours: Share
    shapes: Share
    alone: Share
    scene: Share
    all: Share


@dataclass(frozen=True)
class Switching:
    """Seconds after a prompt switch from which the new attribute is right, by its quartiles over all rollouts.

    None is longer than was watched. ``done`` are the rollouts in which it happened at all.
    """

    attribute: str
    done: Share
    quartiles: tuple[float | None, float | None, float | None]


class Prompt:
    """The judge of one model and policy.

    Args:
        checkpoint: the model.
        policy: what it does with evicted frames.
        test: what is asked.

    Raises:
        ValueError: the model's pictures are not the worlds'.
    """

    def __init__(self, checkpoint: Checkpoint, policy: str, test: PromptTest) -> None:
        check_worlds(checkpoint, "prompt")
        self.checkpoint, self.policy, self.test = checkpoint, policy, test

    def steps(self) -> int:
        """How often :meth:`run` reports progress: once a control and once a rollout."""
        return 3 * self.test.rollouts

    def blocks(self) -> int:
        """Blocks of the longest stream."""
        c = self.checkpoint.config
        return math.ceil(2 * self.test.seconds * c.fps / (4 * c.window.frames_per_block)) + 1

    def run(self, journal: Journal, progress: Callable[[int], None]) -> None:
        """Measure what the journal lacks.

        Args:
            journal: gets a row a control, and two a rollout: before and after the switch.
            progress: called with the number of rollouts done.
        """
        done = {(row["kind"], row["number"]) for row in journal.rows}
        for kind in ("truth", "chance"):
            for number in range(self.test.rollouts):
                if (kind, number) not in done:
                    journal.append([self._control(kind, number)])
                progress(1)
        for first in range(0, self.test.rollouts, self.test.batch):
            numbers = range(first, min(first + self.test.batch, self.test.rollouts))
            if not all((kind, number) in done for kind in ("steady", "switch") for number in numbers):
                journal.append(self._rollouts(numbers))
            progress(len(numbers))

    def _control(self, kind: str, number: int) -> Row:
        """The true video judged by its own prompt, or by another's."""
        last = round(self.test.seconds * self.checkpoint.config.fps)
        first = -(-round(SETTLE * self.checkpoint.config.fps) // _EVERY) * _EVERY
        world = _world(self.test.seed + number)
        other = _world(self.test.seed + (number + 1) % self.test.rollouts)
        prompt = world.prompt if kind == "truth" else other.prompt
        seen = [judge_frame(prompt, world.render(frame, 1)[0]) for frame in range(first, last, 4 * _EVERY)]
        return {"kind": kind, "number": number, "prompt": prompt, **_mostly(seen)}

    def _rollouts(self, numbers: range) -> list[Row]:
        old = [_world(self.test.seed + i).prompt for i in numbers]
        new = [_world(self.test.seed + 100_000 + i).prompt for i in numbers]
        rollout = Rollout(self.checkpoint, self.policy, old, [self.test.seed + i for i in numbers])
        fps = self.checkpoint.config.fps
        before = self._watch(rollout, SETTLE, self.test.seconds)
        switched = block_start(rollout.sampler.block) / fps
        rollout.switch(new)
        after = self._watch(rollout, switched, switched + self.test.seconds)
        rows = []
        for i, number in enumerate(numbers):
            steady = [judge_frame(old[i], video[i]) for _, video in before]
            rows.append({"kind": "steady", "number": number, "prompt": old[i], **_mostly(steady)})
            times = [time - switched for time, _ in after]
            seen = [judge_frame(new[i], video[i]) for _, video in after]
            rows.append(
                {
                    "kind": "switch",
                    "number": number,
                    "prompt": new[i],
                    "objects": settled(times, [x.colours and x.shapes for x in seen]),
                    "scene": settled(times, [x.scene for x in seen]),
                    "all": settled(times, [x.all for x in seen]),
                }
            )
        return rows

    def _watch(self, rollout: Rollout, first: float, end: float) -> list[tuple[float, Tensor]]:
        """Seconds and frames ``(B, 3, H, W)``, twice a second from ``first`` on, up to ``end`` seconds."""
        fps, kept = self.checkpoint.config.fps, []
        while (begins := block_start(rollout.sampler.block)) < end * fps:
            frames = rollout.next_block()[1].cpu()
            numbers = range(begins, begins + frames.shape[1])
            wanted = [n for n in numbers if n >= first * fps and n % _EVERY == 0]
            kept += [(n / fps, frames[:, n - begins]) for n in wanted]
        return kept


def judge_frame(prompt: str, frame: Tensor) -> Seen:
    """Say what of a prompt a frame ``(3, 64, 64)`` uint8 shows.

    Raises:
        ValueError: the prompt does not name its objects.
    """
    named = _named(prompt)
    found = find_objects(frame)
    colours: Counter[str | None] = Counter(x.colour for x in found)
    looks: Counter[tuple[str | None, str | None]] = Counter((x.colour, x.shape) for x in found)
    wanted = Counter(x.colour for x in named)
    return Seen(
        colours=not wanted - colours,
        shapes=not Counter((x.colour, x.shape) for x in named) - looks,
        alone=not colours - wanted,
        scene=scene_of(frame) == parse(prompt).look,
    )


def settled(times: Sequence[float], right: Sequence[bool]) -> float | None:
    """Return the time from which an attribute is right: of the first judged frame that is, and of which and the next
    three at least three are; None if that never happens."""
    for i in range(len(right) - _HELD + 1):
        if right[i] and sum(right[i : i + _HELD]) >= _HELD - 1:
            return times[i]
    return None


def adherence(rows: Iterable[Row]) -> list[Adherence]:
    """Sum up a journal's rows: the truth, chance, and the model before the switch."""
    rows = list(rows)
    found = []
    for kind in _KINDS[:3]:
        some = [row for row in rows if row["kind"] == kind]
        names = ("colours", "shapes", "alone", "scene", "all")
        if some:
            found.append(Adherence(kind, *(Share(sum(row[name] for row in some), len(some)) for name in names)))
    return found


def switching(rows: Iterable[Row]) -> list[Switching]:
    """Sum up a journal's rows: how soon the new prompt's objects, its scene, and all of it show."""
    some = [row for row in rows if row["kind"] == "switch"]
    found = []
    for name in ("objects", "scene", "all") if some else ():
        never = float("inf")
        seconds = sorted(never if row[name] is None else row[name] for row in some)
        at = [seconds[min(len(seconds) - 1, int(q * len(seconds)))] for q in (0.25, 0.5, 0.75)]
        quartiles = tuple(None if x == never else x for x in at)
        done = Share(sum(x < never for x in seconds), len(seconds))
        found.append(Switching(name, done, quartiles))  # type: ignore[arg-type]  # three of them
    return found


def _mostly(seen: Sequence[Seen]) -> Row:
    """Whether each attribute is right in more than half of the frames."""
    names = ("colours", "shapes", "alone", "scene", "all")
    return {name: sum(getattr(x, name) for x in seen) * 2 > len(seen) for name in names}


def _world(seed: int) -> World:
    return World.from_seed(5000 + seed, "open", name_objects=True)


def _named(prompt: str) -> Sequence[NamedObject]:
    named = parse(prompt).objects
    if named is None or any(x.colour is None or x.shape is None for x in named):
        raise ValueError(f"prompt {prompt!r} leaves objects unnamed; there is nothing to judge it by")
    return named
