"""Noise is a pure function of seed, block and step."""

import re

import pytest
import torch
from echo_infinity.noise import MAX_SEED, check_seed, counter_noise
from numerics import assert_same_bits

SHAPE = (1, 3, 2, 4, 4)
COUNTERS = [(block, step) for block in (0, 1, 2, 255, 115_200) for step in range(4)]


def test_same_whatever_the_order_of_draws():
    noise, again = counter_noise(7), counter_noise(7)
    forwards = {c: noise(*c, SHAPE) for c in COUNTERS}
    backwards = {c: again(*c, SHAPE) for c in reversed(COUNTERS)}
    for c in COUNTERS:
        assert_same_bits(forwards[c], backwards[c])
        assert_same_bits(noise(*c, SHAPE), forwards[c])


@pytest.mark.parametrize("seeds", [(0, 1, 2), (2**32, 2**32 + 1, MAX_SEED)], ids=["small", "large"])
def test_different_for_every_seed_block_and_step(seeds):
    draws = {counter_noise(s)(*c, SHAPE).flatten().numpy().tobytes() for s in seeds for c in COUNTERS}
    assert len(draws) == len(seeds) * len(COUNTERS)


def test_block_and_step_are_not_interchangeable():
    noise = counter_noise(0)
    assert not torch.equal(noise(1, 2, SHAPE), noise(2, 1, SHAPE))
    assert not torch.equal(noise(0, 3, SHAPE), noise(3, 0, SHAPE))


def test_neither_reads_nor_moves_the_global_generator():
    noise = counter_noise(3)
    torch.manual_seed(1)
    first, drawn = noise(0, 0, SHAPE), torch.randn(4)
    torch.manual_seed(1)
    assert_same_bits(torch.randn(4), drawn)
    torch.manual_seed(2)
    assert_same_bits(noise(0, 0, SHAPE), first)


def test_is_standard_normal_float32_on_the_cpu_and_uncorrelated_between_counters():
    noise, shape = counter_noise(0), (1, 3, 16, 32, 32)
    draws = torch.stack([noise(block, 0, shape).flatten() for block in range(4)])
    assert (draws.dtype, draws.device.type) == (torch.float32, "cpu")
    deviation = draws.shape[1] ** -0.5  # of a mean, and of a correlation, of that many draws
    covariance = draws @ draws.T / draws.shape[1]
    assert (draws.mean(1).abs() < 5 * deviation).all()
    assert ((covariance - torch.eye(4)).abs() < 8 * deviation).all()


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, True, "7", None])
def test_seeds_out_of_range_are_errors(seed):
    message = re.escape(f"seed must be a whole number in 0 .. {MAX_SEED}, got {seed!r}")
    with pytest.raises(ValueError, match=message):
        counter_noise(seed)
    with pytest.raises(ValueError, match=message):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_seeds_at_the_ends_of_the_range_are_accepted(seed):
    assert check_seed(seed) == seed
    assert counter_noise(seed)(0, 0, SHAPE).shape == SHAPE
