"""Decoding beside the next block: nothing to order on the CPU, the same pixels on a GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from echo_infinity.lane import Lane
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.record import Recorder
from echo_infinity.video import NullWriter
from numerics import assert_same_bits
from small import CIRCLE, save_small, small_pipe


def recorded(stream, blocks):
    """A block's decoding in a thread while the next one is generated, as a recording does it."""
    frames, job = [], None
    with ThreadPoolExecutor(1) as worker:
        for _ in range(blocks):
            latents = stream.next_latents()
            if job is not None:
                frames.append(job.result())
            job = worker.submit(stream.decode, latents)
        return [*frames, job.result()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_are_those_of_decoding_in_turn(tmp_path, device):
    pipe = EchoPipeline.from_pretrained(save_small(tmp_path / "model"), device=device)
    in_turn = pipe.stream(CIRCLE)
    expected = [next(in_turn) for _ in range(12)]
    assert_same_bits(recorded(pipe.stream(CIRCLE), 12), expected)


def test_a_recording_decodes_a_block_while_it_generates_the_next(monkeypatch):
    stream, waited = small_pipe().stream(CIRCLE), []
    generate, decode, begun = stream.next_latents, stream.decode, [threading.Event() for _ in range(5)]

    def generating():
        begun[stream.block].set()
        return generate()

    def decoding(latents):
        after = begun[len(waited) + 1 :][:1]  # nothing comes after the last block
        waited.append(all(event.wait(timeout=30) for event in after))
        return decode(latents)

    monkeypatch.setattr(stream, "next_latents", generating)
    monkeypatch.setattr(stream, "decode", decoding)
    assert Recorder(stream, NullWriter(), target=57).run()
    assert waited == [True] * 5


def test_the_cpu_has_one_lane():
    lane, x = Lane(torch.device("cpu")), torch.zeros(2)
    lane.made()
    with lane.use(x):
        x += 1
    assert not lane._events
    assert x.eq(1).all()


def test_blocks_that_nobody_decodes_leave_no_marks(monkeypatch):
    marks = []
    monkeypatch.setattr(Lane, "made", lambda lane: marks.append(lane))
    latents, pixels = small_pipe().stream(CIRCLE, output_type="latents"), small_pipe().stream(CIRCLE)
    for _ in range(3):
        next(latents)
    assert not marks
    next(pixels)
    assert len(marks) == 1
