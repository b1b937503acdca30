"""Streams of the small model in every way that several processes could upset; under torchrun or alone."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "model"))

from echo_infinity.parallel import Ranks, join_ranks, lead, leave_ranks
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.policies import make_generator
from echo_infinity.weights import load_checkpoint, write_tensors
from small import CIRCLE, SQUARE

BLOCKS = 9  # the window is full after 4; 5 blocks evict
SWITCHES = {
    "plain": {},
    "kept": {"global_sink": True},
    "anew": {"global_sink": False, "memory_recache": True},
}


def run(folder: Path, out: Path, ranks: Ranks) -> None:
    """Write every stream's latents and last state to ``out``; the first process alone writes."""
    out.mkdir(exist_ok=True)
    pipe = EchoPipeline.from_pretrained(folder, ranks=ranks)
    narrow = EchoPipeline.from_pretrained(folder, kv="fp8", ranks=ranks)

    def program() -> None:
        for name, options in SWITCHES.items():
            _record(pipe, out, name, options if name != "plain" else None)
        _record(pipe, out, "off", {}, memory="off")
        _interleaved(pipe, out)

    lead(pipe, program)
    lead(narrow, lambda: _record(narrow, out, "fp8", {}))
    checkpoint = load_checkpoint(folder)
    pooled = EchoPipeline(checkpoint._replace(config=make_generator(checkpoint, "pooled").config), ranks=ranks)
    lead(pooled, lambda: _record(pooled, out, "pooled", {}))
    try:
        lead(EchoPipeline.from_pretrained(folder, ranks=ranks), _fail)
    except KeyError as error:
        (out / "failed").write_text(error.args[0])


def _fail() -> None:
    raise KeyError("the program's own")


def _record(pipe: EchoPipeline, out: Path, name: str, switch: dict | None, **options: object) -> None:
    with pipe.stream(CIRCLE, seed=3, output_type="latents", **options) as stream:
        blocks = []
        for block in range(BLOCKS):
            if block == 6 and switch is not None:
                stream.switch(SQUARE, **switch)
            blocks.append(next(stream))
        stream.save(out / f"{name}.state.safetensors")
    write_tensors(out / f"{name}.safetensors", {"latents": torch.cat(blocks)}, {})


def _interleaved(pipe: EchoPipeline, out: Path) -> None:
    """Two streams in turn, one of them a fork, another a resumed one: pixels, and noise of the caller's own."""
    path = out / "middle.state.safetensors"

    def noise(block: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(100 * block + step))

    frames = []
    with pipe.stream(SQUARE, noise=noise) as stream:
        frames += [next(stream) for _ in range(5)]
        stream.save(path)
        with stream.fork() as twin, pipe.resume(path, noise=noise) as again:
            for _ in range(2):
                frames += [next(stream), next(twin), next(again)]
    write_tensors(out / "interleaved.safetensors", {f"{i:02}": x for i, x in enumerate(frames)}, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = join_ranks()
    run(Path(sys.argv[1]), Path(sys.argv[2]), ranks)
    leave_ranks()
