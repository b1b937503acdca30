"""Kill a generating process at random instants, resume it each time, and compare with a run that nobody killed.

    python bench/kill.py --kills 20 --model tiny

Exits 1 unless the raw frames of every block have the unbroken run's hashes and the mp4 decodes to exactly the frames
asked for, with rising timestamps.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import av

PROMPT = "a red circle drifts over a dark field"
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Outcome:
    """What a broken run came to."""

    kills: int
    resumed_at: list[int]  # frames in the state at each kill; 0 before the first
    same_frames: bool
    times: list[int]  # of the mp4's frames, in frames

    def ok(self, frames: int) -> bool:
        return self.same_frames and self.times == list(range(frames))


def break_and_resume(model: str, folder: Path, *, kills: int, frames: int, seed: int = 0) -> Outcome:
    """Run once undisturbed and once with ``kills`` SIGKILLs, each after a random time into new blocks.

    Raises:
        RuntimeError: a run failed by itself, or ended before it was killed often enough.
    """
    draw = random.Random(seed)
    said = _finish(_command(model, folder / "whole.mp4", folder / "whole.txt", frames))
    block = float(said.split("generated in ")[1].split(" s")[0]) * 12 / frames
    video, hashes, state = folder / "broken.mp4", folder / "broken.txt", folder / "broken.state.safetensors"
    resumed_at = []
    for kill in range(kills):
        seen = _lines(hashes)
        process = subprocess.Popen(_command(model, video, hashes, frames, state), stderr=subprocess.PIPE, text=True)
        wanted = seen + draw.randint(0, 2)
        limit = time.monotonic() + _TIMEOUT
        while process.poll() is None and _lines(hashes) <= wanted and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 3 * block))
        if process.poll() is not None:
            raise RuntimeError(f"ended by itself before kill {kill + 1}: {process.communicate()[1]}")
        process.kill()
        process.communicate()
        resumed_at.append(_frames_of(state))
    _finish(_command(model, video, hashes, frames, state))
    with av.open(str(video)) as file:
        stream = file.streams.video[0]
        times = [round(float(f.pts * stream.time_base * stream.average_rate)) for f in file.decode(stream)]
    return Outcome(kills, resumed_at, _hashes(hashes) == _hashes(folder / "whole.txt"), times)


def _command(model: str, video: Path, hashes: Path, frames: int, state: Path | None = None) -> list[str]:
    words = [sys.executable, "-m", "echo_infinity.cli", "generate", "--raw-hashes", str(hashes), "--threads", "1"]
    if state is not None:
        words += ["--autosave", "0"]
    if state is not None and state.exists():
        return [*words, "--resume", str(state)]
    return [*words, PROMPT, "--frames", str(frames), "-o", str(video), "--model", model, "--overwrite"]


def _finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _frames_of(state: Path) -> int:
    from echo_infinity.state import read_state

    return read_state(state).meta["frames"] if state.exists() else 0


def _hashes(path: Path) -> dict[int, str] | None:
    """Block -> hash of its raw frames; None if two runs disagree about a block."""
    found: dict[int, str] = {}
    for line in path.read_text().splitlines():
        block, digest = line.split()
        if found.setdefault(int(block), digest) != digest:
            return None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, help="default: enough for the kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    frames = args.frames or 12 * (6 * args.kills + 10)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        outcome = break_and_resume(args.model, Path(folder), kills=args.kills, frames=frames, seed=args.seed)
    sys.stdout.write(f"{outcome.kills} kills, the states then held {outcome.resumed_at} frames\n")
    sys.stdout.write(f"raw frames of every block as in the unbroken run: {outcome.same_frames}\n")
    rising = outcome.times == list(range(frames))
    sys.stdout.write(f"mp4: {len(outcome.times)} frames of {frames}, timestamps 0, 1, 2, ...: {rising}\n")
    return 0 if outcome.ok(frames) else 1


if __name__ == "__main__":
    sys.exit(main())
