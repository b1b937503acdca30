"""What ``echo-infinity generate`` is asked for: checked before the first block, the cheap things first, then opened."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from echo_ext import __version__
from echo_infinity.batch import StreamBatch
from echo_infinity.commands.places import clear_place, hold_places, numbered, state_path
from echo_infinity.image import load_image
from echo_infinity.parallel import Ranks
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.prompts import read_schedule
from echo_infinity.record import append_line, frames_ahead
from echo_infinity.settings import frame_count
from echo_infinity.state import SavedStream, SavedVideo
from echo_infinity.stream import Stream
from echo_infinity.video import NullWriter, VideoPosition, VideoWriter, open_writer

# Blocks of fewer values than this (tokens x width) are done sooner by one thread than shared out.
_SMALL_BLOCK = 2**17
_PARTS = ("text", "text_device", "text_keep", "decoder", "decoder_dtype", "weights", "kv")
# What may differ when a stream goes on; another decoder or size needs a new stream.


@dataclass(frozen=True)
class Job:
    """A stream of the request and its video, open."""

    stream: Stream
    writer: VideoWriter
    output: str | None
    target: int | None
    state: Path
    hashes: Path | None


class _Plan(NamedTuple):
    """A stream and the places it is to go to, nothing of which is touched yet."""

    stream: Stream
    position: VideoPosition | None
    output: str | None
    target: int | None
    state: Path
    resume: Path | None
    hashes: Path | None

    @property
    def ahead(self) -> int:
        """Frames by which the video is ahead of its stream."""
        have = 0 if self.position is None else self.position.frames
        rest = 0 if self.stream.video is None else len(self.stream.video.rest)
        return frames_ahead(self.stream, have + rest)


@dataclass(frozen=True)
class Request:
    """Everything that was asked for, open.

    Args:
        jobs: the streams.
        batch: what makes their blocks, where there are several.
    """

    jobs: list[Job]
    batch: StreamBatch | None


def check_options(args: argparse.Namespace, saved: Sequence[SavedStream]) -> None:
    """Refuse what can't be served whatever the model.

    Raises:
        ValueError: names the option and what to change.
    """
    if not saved:
        if not args.prompt and args.prompt_file is None:
            raise ValueError('what should it show? Give a prompt, such as "a red circle drifts over a dark field"')
        if args.output is None and not args.no_video:
            raise ValueError("where should the video go? Give -o out.mp4, -o FOLDER for PNG files, or --no-video")
        rows(args.prompt or [""], args.seed or [0])
    if args.prompt and args.prompt_file is not None:
        raise ValueError("give a prompt or --prompt-file, not both: the file's first line is the first prompt")
    _check_words(args.prompt or [])
    if saved:
        _check_resume(args, saved)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if args.autosave is not None and not args.autosave >= 0:
        raise ValueError(f"--autosave is seconds >= 0, got {args.autosave}")


def _check_words(prompts: Sequence[str]) -> None:
    """Refuse what is no prompt but a slip: a file without its option, words without their quotes."""
    for prompt in prompts:
        if Path(prompt).suffix and os.path.isfile(prompt):
            raise ValueError(
                f"the prompt {prompt!r} names a file: give each saved stream its own --resume, prompts by time "
                "--prompt-file, a picture --image"
            )
    if len(prompts) > 1 and not any(" " in prompt.strip() for prompt in prompts):
        raise ValueError(f"{len(prompts)} prompts of one word each: put a prompt of several words in quotes")


def rows(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Return the prompt and the seed of each stream: one of either goes with all of the others.

    Raises:
        ValueError: several of both, and not equally many.
    """
    count = max(len(prompts), len(seeds))
    if len(prompts) not in (1, count) or len(seeds) not in (1, count):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one of either, or equally many")
    return [(prompts[i % len(prompts)], seeds[i % len(seeds)]) for i in range(count)]


def load(args: argparse.Namespace, saved: Sequence[SavedStream], ranks: Ranks) -> EchoPipeline:
    """Load the model that is asked for, or that the saved streams ran on, and set the number of threads."""
    first = saved[0].meta if saved else {}
    then = first.get("environment", {})
    cuda = ranks.device.type == "cuda" and then.get("device", "cuda").startswith("cuda")
    device = args.device or ("cuda" if cuda else "cpu")
    if ranks.mesh is not None and device == "cuda":
        device = str(ranks.device)  # each process its own
    model = args.model or first.get("source") or "tiny"
    dtype = getattr(torch, args.dtype or then.get("dtype", "float32").partition(",")[0])
    parts: dict[str, Any] = dict(first.get("parts", {}))
    parts |= {name: getattr(args, name) for name in _PARTS if getattr(args, name) is not None}
    if "decoder_dtype" in parts:
        parts["decoder_dtype"] = getattr(torch, parts["decoder_dtype"])
    pipe = EchoPipeline.from_pretrained(model, dtype=dtype, device=device, ranks=ranks, **parts)
    c = pipe.config
    small = c.window.frames_per_block * c.tokens_per_frame * c.model.width < _SMALL_BLOCK
    torch.set_num_threads(args.threads or then.get("threads") or (1 if small else torch.get_num_threads()))
    return pipe


def prepare(args: argparse.Namespace, pipe: EchoPipeline, saved: Sequence[SavedStream]) -> Request:
    """Check everything that can be checked before the first block, and open streams and videos.

    Raises:
        ValueError, OSError, VideoWriteError: the request can't be served; nothing was generated.
    """
    streams, batch = _open_streams(args, pipe, saved)
    plans = [_plan(args, x, saved[i] if saved else None, (i, len(streams))) for i, x in enumerate(streams)]
    _check_together(plans)
    for plan in plans:
        hold_places(plan.state, keep=plan.resume, overwrite=args.overwrite)
    for plan in plans:
        if plan.hashes is not None:
            append_line(plan.hashes, "")
    jobs: list[Job] = []
    made: list[Path] = []  # videos that were not there before
    try:
        for plan in plans:
            if plan.output is not None and not os.path.exists(plan.output):
                made.append(Path(plan.output))
            jobs.append(Job(plan.stream, _open_video(args, plan), plan.output, plan.target, plan.state, plan.hashes))
    except BaseException:
        for job in jobs:
            job.writer.close()
        for path in made:
            with contextlib.suppress(OSError):  # a folder of pictures that holds others, or none yet
                path.rmdir() if path.is_dir() else path.unlink()
        raise
    for plan in plans:
        clear_place(plan.state, keep=plan.resume)
    return Request(jobs, batch)


def _check_resume(args: argparse.Namespace, saved: Sequence[SavedStream]) -> None:
    if args.image:
        raise ValueError("--image starts a stream; a resumed one has begun: leave it out")
    if len(args.prompt or []) not in (0, 1, len(saved)):
        raise ValueError(f"{len(args.prompt)} prompts for {len(saved)} resumed streams: give one, or one for each")
    for i, one in enumerate(saved):
        seeds = args.seed or [one.meta["seed"]]
        if seeds[i % len(seeds)] != one.meta["seed"]:
            raise ValueError(f"--seed of a resumed stream can't change: it is {one.meta['seed']}; leave it out")
        if args.memory not in (None, one.meta["memory"]):
            raise ValueError(f"--memory of a resumed stream can't change: it is {one.meta['memory']}; leave it out")
        if one.meta["output_type"] != "pixels" or one.meta["noise"] != "counter":
            raise ValueError(f"{one.path} ran with latents or the caller's own noise: resume it from Python")


def _open_streams(
    args: argparse.Namespace, pipe: EchoPipeline, saved: Sequence[SavedStream]
) -> tuple[list[Stream], StreamBatch | None]:
    schedule = () if args.prompt_file is None else read_schedule(args.prompt_file)
    if saved:
        batch = pipe.resume_batch(saved) if len(saved) > 1 else None
        streams = [pipe.resume(saved[0])] if batch is None else batch.streams
        for i, stream in enumerate(streams):
            if args.prompt:
                _switch(stream, args.prompt[i % len(args.prompt)])
            if schedule:
                stream.reschedule(schedule)
        return streams, batch
    wanted = rows(args.prompt or [schedule[0].prompt], args.seed or [0])
    images = [load_image(path, pipe.size) for path in args.image or []]
    if images and len(images) not in (1, len(wanted)):
        raise ValueError(f"{len(images)} images for {len(wanted)} streams: give one, or one for each")
    if len(wanted) == 1:
        prompt, seed = wanted[0]
        image = images[0] if images else None
        return [pipe.stream(prompt, seed=seed, schedule=schedule[1:], image=image, memory=args.memory)], None
    batch = pipe.batch(
        [prompt for prompt, _ in wanted],
        [seed for _, seed in wanted],
        schedule=schedule[1:],
        images=[images[i % len(images)] for i in range(len(wanted))] if images else None,
        memory=args.memory,
    )
    return batch.streams, batch


def _switch(stream: Stream, prompt: str) -> None:
    if stream.switching or prompt != stream.prompt:
        stream.switch(prompt)


def _plan(args: argparse.Namespace, stream: Stream, saved: SavedStream | None, place: tuple[int, int]) -> _Plan:
    def own(path: str | Path | None) -> Path | None:
        return None if path is None else numbered(path, *place)

    resume = None if saved is None else saved.path
    position, output = _find_video(None if args.output is None else str(own(args.output)), args.no_video, saved)
    target = _target(args, saved, position, stream.pipe.fps)
    video = own(args.output) or output
    state = own(args.save) or resume or (own(state_path(None)) if video is None else state_path(video))
    assert state is not None
    return _Plan(stream, position, output, target, state, resume, own(args.raw_hashes))


def _check_together(plans: Sequence[_Plan]) -> None:
    """Refuse streams that would write to one place, or whose videos would not be full at the same block."""
    for what in ("resume", "output", "state", "hashes"):
        places = [os.path.realpath(x) for plan in plans if (x := getattr(plan, what)) is not None]
        if again := [x for i, x in enumerate(places) if x in places[:i]]:
            raise ValueError(
                f"two streams of a batch can't share {again[0]}: resume each once, and to a video of its own"
            )
    if len({plan.target for plan in plans}) > 1:
        raise ValueError("the videos were to have different lengths: say how long, such as --seconds 60")
    if plans[0].target is not None and len({plan.ahead for plan in plans}) > 1:
        raise ValueError("the videos began at different blocks of their streams: resume them one at a time")


def _open_video(args: argparse.Namespace, plan: _Plan) -> VideoWriter:
    if plan.output is None:
        return NullWriter(resume=plan.position)
    stream = plan.stream
    height, width = stream.pipe.size
    return open_writer(
        plan.output,
        width=width,
        height=height,
        fps=stream.pipe.fps,
        metadata={"prompt": stream.prompt, "seed": stream.settings.seed, "version": f"echo-infinity {__version__}"},
        resume=plan.position,
        overwrite=args.overwrite,
    )


def _find_video(
    output: str | None, no_video: bool, saved: SavedStream | None
) -> tuple[VideoPosition | None, str | None]:
    """Where the video goes, and the position at which it goes on, if it does."""
    video: SavedVideo | None = None if saved is None else saved.video
    if no_video:
        return (None if video is None else VideoPosition(frames=video.position.frames)), None
    if output is None:
        return (None, None) if video is None else (video.position, video.path)
    output = os.path.abspath(output)
    if video is None or video.path is None or (output != video.path and not os.path.exists(output)):
        return None, output
    return video.position, output


def _target(
    args: argparse.Namespace, saved: SavedStream | None, position: VideoPosition | None, fps: int
) -> int | None:
    """Frames that the whole video is to have; None for endless."""
    if args.endless:
        return None
    units = {"seconds": 1, "minutes": 60, "hours": 3600}
    given = [getattr(args, name) * unit for name, unit in units.items() if getattr(args, name) is not None]
    target: int | None
    if given:
        target = frame_count(given[0], fps)
    elif args.frames is not None:
        target = args.frames
    elif saved is not None and saved.video is not None and position is not None:
        target = saved.video.target
    else:
        raise ValueError("how long? Give --seconds, --minutes, --hours, --frames or --endless")
    have = 0 if position is None else position.frames
    if target is not None and target <= have:
        if have:
            raise ValueError(f"the video has {have} frames ({have / fps:.2f} s) already: ask for more, or --endless")
        raise ValueError(f"the length must be at least one frame, got {target}")
    return target
