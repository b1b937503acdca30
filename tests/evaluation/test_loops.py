"""Loops of known period are found; frozen, drifting and never repeating series have none."""

import pytest
import torch
from echo_infinity.evaluation.loops import HISTORY, LoopWatch, distances, period, thumbnails


def series(n, d=32):
    return torch.randn(n, d)


@pytest.mark.parametrize("length", [7, 37, 200])
def test_loop_of_known_period_is_found(length):
    once = torch.randn(length, 32).cumsum(0) - torch.linspace(0, 1, length)[:, None] * torch.randn(32)
    past = once.repeat(HISTORY // length + 1, 1)[:HISTORY]
    noisy = past + 0.02 * past.std() * torch.randn_like(past)
    assert period(past) == length
    assert period(noisy) == length


def test_period_between_blocks_is_found_at_the_multiple_that_is_whole():
    phase = torch.arange(HISTORY) * (2 * torch.pi / 12.5)
    assert period(torch.stack([phase.cos(), phase.sin()], 1)) in (12, 13, 25)


def test_frozen_noise_and_drift_have_no_period():
    assert period(torch.ones(HISTORY, 32)) is None
    assert period(series(HISTORY)) is None
    assert period(series(HISTORY).cumsum(0)) is None
    assert period(torch.linspace(0, 1, HISTORY)[:, None].expand(-1, 32)) is None


def test_distance_of_unrelated_blocks_is_one_and_of_a_repetition_zero():
    assert distances(series(HISTORY))[1:100].mean().item() == pytest.approx(1, abs=0.05)
    assert distances(series(32).repeat(4, 1))[32].item() == pytest.approx(0, abs=1e-9)
    assert distances(torch.ones(8, 3)).isnan().all()


def test_watch_holds_the_last_blocks_of_each_stream_and_goes_on_from_its_tensors():
    loop, never = torch.randn(20, 3, 8, 8, 8), torch.randn(HISTORY + 40, 3, 8, 8, 8)
    watch, twin = (LoopWatch(2, thumbnails(never[:1]).shape[1]) for _ in range(2))
    for i in range(HISTORY + 40):
        block = torch.stack([loop[i % 20], never[i]])
        if i == 300:
            twin.load_tensors(watch.tensors())
        for one in (watch, twin):
            one.push(block)
    assert watch.periods() == twin.periods() == [20, None]
    assert watch.tensors()["past"].shape == (HISTORY, 2, 128)
