"""Recall: an object goes out of sight for longer than the window; does it come back as it was, where it was?

Objects first show after the sink frames, behind a curtain that opens and closes, and no prompt names them. While the
curtain is closed they stand still. Modes, by who made what came before the return, which is always the model's own:

    shown    the true video, up to the block in which the curtain opens again
    swapped  the same, but the memory is another rollout's: what does not come from memory stays
    staged   the model, except for closed curtain of the wanted length, which shows nothing of what is behind it
    free     the model, everything; the curtain closes and opens when the model lets it

Controls that need no model: the truth's own score, the truth through the codec, and chance (the true return of another
scene).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from echo_infinity.codec import to_uint8, to_unit
from echo_infinity.evaluation.free import Watch
from echo_infinity.evaluation.journal import Journal, Row
from echo_infinity.evaluation.objects import find_objects
from echo_infinity.evaluation.returns import LOOK_BACK, Answer, Question, ask, judge_return
from echo_infinity.evaluation.sampling import Rollout
from echo_infinity.evaluation.scenes import OPEN, curtain_share
from echo_infinity.evaluation.stats import Share
from echo_infinity.policies import find_policy
from echo_infinity.weights import Checkpoint
from echo_infinity.worlds import World, block_start
from echo_infinity.worlds.motion import SIZE

MODES = ("shown", "swapped", "staged", "free")
CONTROLS = ("truth", "codec", "chance")
JUDGED = (5, 8, 11)  # frames of the reopening's block: the curtain takes three to open
FREE_BLOCKS = 36  # of a free rollout: two openings and closings of the worlds' usual curtain
Progress = Callable[[int], None]


@dataclass(frozen=True)
class RecallTest:
    """What is asked.

    Args:
        rollouts: a mode and absence.
        absences: in windows: 2 hides objects for twice as many frames as the window holds.
        modes: of ``MODES``; ``free`` has the absences that the model makes.
        sight: open blocks before the curtain closes.
        seed: of the first scene and its noise; none of them occurs in training.
        batch: rollouts side by side.

    Raises:
        ValueError: a mode is unknown, or a number is too small.
    """

    rollouts: int = 256
    absences: tuple[float, ...] = (1, 2, 4)
    modes: tuple[str, ...] = ("shown", "staged")
    sight: int = 2
    seed: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        if unknown := [mode for mode in self.modes if mode not in MODES]:
            raise ValueError(f"recall modes are {', '.join(MODES)}, got {', '.join(unknown)}")
        if min(self.rollouts, self.batch) < 2 or self.sight < 1:
            raise ValueError(f"recall needs 2 rollouts, batches of 2 and 1 block in sight, got {self}")
        if not self.absences or min(self.absences) < 1:
            raise ValueError(f"absences are in windows, at least 1, got {self.absences}")

    def settings(self) -> Row:
        """What a rollout's result depends on beside its number."""
        return {"sight": self.sight, "seed": self.seed, "batch": self.batch}


@dataclass(frozen=True)
class Cell:
    """One line of the table: shares over the rollouts in which there was something to ask for.

    ``strict`` is the right colour over all rollouts, those that showed nothing to ask for among them; a bin of free
    rollouts has none, since what ended in other bins was no failure.
    """

    mode: str
    absence: float | None
    rollouts: int
    asked: int
    colour: Share
    shape: Share
    place: Share
    all: Share
    strict: Share | None


@dataclass
class Recall:
    """The judge of one model and policy.

    Args:
        checkpoint: the model.
        policy: what it does with evicted frames.
        test: what is asked.

    Raises:
        ValueError: the model's pictures are not the worlds', or an absence would leave objects in the window.
    """

    checkpoint: Checkpoint
    policy: str
    test: RecallTest
    _scenes: list[Scene] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_worlds(self.checkpoint, "recall")

    def steps(self) -> int:
        """How often :meth:`run` reports progress: once a rollout."""
        return len(list(self._cells())) * self.test.rollouts

    def blocks(self) -> int:
        """Blocks of the longest stream."""
        shown = 2 + self.test.sight + self._blocks(max(self.test.absences))
        return max(shown, FREE_BLOCKS if "free" in self.test.modes else 0)

    def run(self, journal: Journal, progress: Progress) -> None:
        """Measure what the journal lacks.

        Args:
            journal: gets a row a rollout.
            progress: called with the number of rollouts done.
        """
        done = {(row["mode"], row["absence"], row["number"]) for row in journal.rows}
        for mode, absence in self._cells():
            for first in range(0, self.test.rollouts, self.test.batch):
                numbers = range(first, min(first + self.test.batch, self.test.rollouts))
                if not all((mode, absence, number) in done for number in numbers):
                    rows = self._measure(mode, absence, numbers)
                    journal.append([{"mode": mode, "absence": absence, **row} for row in rows])
                progress(len(numbers))

    def _cells(self) -> Iterable[tuple[str, float | None]]:
        yield from ((mode, None) for mode in CONTROLS)
        for mode in self.test.modes:
            yield from ((mode, absence) for absence in ([None] if mode == "free" else self.test.absences))

    def _measure(self, mode: str, absence: float | None, numbers: range) -> list[Row]:
        if mode == "free":
            return self._free(numbers)
        if absence is None:
            return [self._control(mode, number) for number in numbers]
        return self._staged(absence, numbers) if mode == "staged" else self._shown(absence, numbers, mode == "swapped")

    def _control(self, mode: str, number: int) -> Row:
        scene = self._scene(number)
        shown = self._scene((number + 1) % self.test.rollouts) if mode == "chance" else scene
        video = self._through_codec(scene) if mode == "codec" else shown.reopening()
        return _row(number, scene.seed, scene.question, judge_return(scene.question, [video[i] for i in JUDGED]))

    @torch.inference_mode()
    def _through_codec(self, scene: Scene) -> Tensor:
        world, reopening = scene.world(1), 2 + scene.sight
        frames = world.render(0, block_start(reopening + 1))
        pixels, _ = self.checkpoint.codec.decode(self.checkpoint.codec.encode(self._unit(frames)[None])[0])
        return to_uint8(pixels[0, block_start(reopening) :]).cpu()

    @torch.inference_mode()
    def _shown(self, absence: float, numbers: range, swapped: bool) -> list[Row]:
        scenes = [self._scene(number) for number in numbers]
        blocks = self._blocks(absence)
        rollout = self._rollout(scenes)
        per = self.checkpoint.config.window.frames_per_block
        for latents in self._encode([scene.world(blocks) for scene in scenes], blocks).split(per, dim=1):
            rollout.observe(latents)
        if swapped:
            _swap_memories(rollout)
        frames = rollout.next_block()[1].cpu()
        return [
            _row(number, scene.seed, scene.question, judge_return(scene.question, [video[i] for i in JUDGED]))
            for number, scene, video in zip(numbers, scenes, frames, strict=True)
        ]

    @torch.inference_mode()
    def _staged(self, absence: float, numbers: range) -> list[Row]:
        scenes = [self._scene(number) for number in numbers]
        blocks, sight, per = self._blocks(absence), self.test.sight, self.checkpoint.config.window.frames_per_block
        rollout = self._rollout(scenes)
        # Block 0 and the closed ones look alike in all worlds of one schedule: one world's latents serve all.
        closed = self._encode([scenes[0].world(blocks)], blocks).expand(len(scenes), -1, -1, -1, -1).split(per, dim=1)
        rollout.observe(closed[0])
        seen = torch.cat([rollout.next_block()[1].cpu() for _ in range(sight)], 1)
        for latents in closed[1 + sight :]:
            rollout.observe(latents)
        frames = rollout.next_block()[1].cpu()
        rows = []
        for number, scene, before, after in zip(numbers, scenes, seen, frames, strict=True):
            open_frames = before[curtain_share(before) <= OPEN]
            question = ask(find_objects(open_frames[-LOOK_BACK:][0]), scene.seed) if len(open_frames) else None
            answer = None if question is None else judge_return(question, [after[i] for i in JUDGED])
            rows.append(_row(number, scene.seed, question, answer))
        return rows

    @torch.inference_mode()
    def _free(self, numbers: range) -> list[Row]:
        scenes = [self._scene(number) for number in numbers]
        rollout = self._rollout(scenes)
        watches = [Watch(scene.seed) for scene in scenes]
        for _ in range(FREE_BLOCKS):
            frames = rollout.next_block()[1].cpu()
            for watch, video in zip(watches, frames, strict=True):
                watch.push(video)
            if all(watch.done for watch in watches):
                break
        window = block_frames(self.checkpoint, self._blocks(1))
        return [
            {**_row(n, watch.seed, watch.question, watch.answer), "windows": watch.hidden / window}
            for n, watch in zip(numbers, watches, strict=True)
        ]

    def _rollout(self, scenes: Sequence[Scene]) -> Rollout:
        prompts = [scene.world(1).prompt for scene in scenes]
        return Rollout(self.checkpoint, self.policy, prompts, [scene.seed for scene in scenes])

    def _blocks(self, absence: float) -> int:
        config = self.checkpoint.config
        return round(absence * find_policy(self.policy).sliding_frames(config) / config.window.frames_per_block)

    def _encode(self, worlds: Sequence[World], absence: int) -> Tensor:
        """Latents ``(B, F, C, h, w)`` of all blocks before the reopening's."""
        codec, first_closed = self.checkpoint.codec, 1 + self.test.sight
        own = torch.stack([world.render(0, block_start(first_closed + 1)) for world in worlds])
        latents, state = codec.encode(self._unit(own))
        if absence == 1:
            return latents
        # From the second closed block on the worlds look alike, and the codec remembers one latent frame.
        start = block_start(first_closed + 1)
        rest = worlds[0].render(start, block_start(first_closed + absence) - start)[None]
        same, _ = codec.encode(self._unit(rest), {name: x[:1] for name, x in state.items()})
        return torch.cat([latents, same.expand(len(worlds), -1, -1, -1, -1)], 1)

    def _unit(self, frames: Tensor) -> Tensor:
        return to_unit(frames.to(next(self.checkpoint.model.parameters()).device))

    def _scene(self, number: int) -> Scene:
        """Return scene ``number`` of those whose return the judge reads right off the true video."""
        seed = self._scenes[-1].seed + 1 if self._scenes else self.test.seed
        while len(self._scenes) <= number:
            scene = Scene.of(seed, self.test.sight)
            if scene is not None:
                self._scenes.append(scene)
            seed += 1
        return self._scenes[number]


@dataclass(frozen=True)
class Scene:
    """A world of which one object is asked for."""

    seed: int
    sight: int
    question: Question

    @classmethod
    def of(cls, seed: int, sight: int) -> Scene | None:
        """Return world ``seed``, or None where the true return can't be read: objects that hide each other, say.

        No model has a part in this, so it favours none; but it makes the truth's own score 1.
        """
        world = hidden_world(seed, sight, 1)
        video = world.render(block_start(2 + sight), max(JUDGED) + 1)
        question = ask(find_objects(video[JUDGED[1]]), seed)
        if question is None or len(question.objects) != len(world.objects):
            return None
        truths = {truth.colour: truth for truth in world.truth(block_start(2 + sight) + JUDGED[1])}
        if any(found.colour not in truths or found.shape != truths[found.colour].shape for found in question.objects):
            return None
        answer = judge_return(question, [video[i] for i in JUDGED])
        return cls(seed, sight, question) if answer.all else None

    def world(self, absence: int) -> World:
        """Return the world with the curtain closed for ``absence`` blocks."""
        return hidden_world(self.seed, self.sight, absence)

    def reopening(self) -> Tensor:
        """Return the true frames of the block in which the curtain opens again, the same for every absence."""
        return self.world(1).render(block_start(2 + self.sight), max(JUDGED) + 1)


def hidden_world(seed: int, sight: int, absence: int) -> World:
    """Return a world whose prompt names no object: a closed block, ``sight`` open, ``absence`` closed, then open."""
    closed = [True] + [False] * sight + [True] * absence + [False] * 4
    return World.from_seed(seed, "curtain", name_objects=False, curtain_blocks=closed)


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Sum up a journal's rows; free rollouts by how many windows the objects were out of sight."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        absence = row["absence"]
        if row["mode"] == "free" and row["asked"]:
            absence = next((bound for bound in (4, 2, 1) if row["windows"] >= bound), 0)
        groups.setdefault((row["mode"], absence), []).append(row)
    free = sum(len(group) for (mode, _), group in groups.items() if mode == "free")
    order = (*CONTROLS, *MODES)
    found = []
    for (mode, absence), group in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1] or 0)):
        asked = [row for row in group if row["asked"]]
        if mode == "free" and absence is None:
            continue  # nothing went out of sight and came back: counted in ``rollouts`` alone
        names = ("colour", "shape", "place", "all")
        colour, shape, place, whole = (Share(sum(row[name] for row in asked), len(asked)) for name in names)
        of_all = (free, None) if mode == "free" else (len(group), Share(colour.right, len(group)))
        found.append(Cell(mode, absence, of_all[0], len(asked), colour, shape, place, whole, of_all[1]))
    return found


def check_worlds(checkpoint: Checkpoint, what: str) -> None:
    """Raise ValueError where a model does not make pictures of the worlds' size, by which ``what`` is judged."""
    c = checkpoint.config
    size = c.latent_rows * 8, c.latent_columns * 8
    if size != (SIZE, SIZE) or c.window.frames_per_block != 3:
        raise ValueError(
            f"{what} is judged on the procedural worlds, {SIZE} x {SIZE} pixels in blocks of 3 latent frames; model "
            f"{c.name} makes {size[1]} x {size[0]} in blocks of {c.window.frames_per_block}: leave {what} out"
        )


def block_frames(checkpoint: Checkpoint, blocks: int) -> int:
    """Pixel frames of ``blocks`` blocks past the first."""
    return 4 * checkpoint.config.window.frames_per_block * blocks


def _row(number: int, seed: int, question: Question | None, answer: Answer | None) -> Row:
    right = Answer(False, False, False) if answer is None else answer
    wanted = None if question is None else question.objects[question.target]
    return {
        "number": number,
        "seed": seed,
        "asked": answer is not None,
        "wanted": None if wanted is None else f"{wanted.colour} {wanted.shape}",
        "objects": 0 if question is None else len(question.objects),
        "colour": right.colour,
        "shape": right.shape,
        "place": right.place,
        "all": right.all,
    }


def keeps_memory(checkpoint: Checkpoint, policy: str) -> bool:
    """Return whether streams under a policy keep anything of frames that left: what mode ``swapped`` swaps."""
    memory = Rollout(checkpoint, policy, ["shapes drift over a dark field"], [0]).sampler.memory
    return memory is not None and bool(memory.tensors())


def _swap_memories(rollout: Rollout) -> None:
    memory = rollout.sampler.memory
    kept = {} if memory is None else memory.tensors()
    if memory is None or not any(x.ndim for x in kept.values()):
        raise ValueError("recall mode 'swapped' swaps memories, and this policy has none: leave it out")
    # Evictions that wait to be written are (B, ..), states (groups or layers, B, ..), counters numbers.
    memory.load_tensors(
        {name: x.roll(1, 0 if name.startswith("pending.") else 1) if x.ndim else x for name, x in kept.items()}
    )
