"""Losses against their formulas."""

import pytest
import torch
from echo_infinity.training.losses import (
    add_noise,
    dmd_gradient,
    flow_loss,
    guide,
    score_level,
    shift_level,
    surrogate_loss,
    to_x0,
    x0_loss,
)
from numerics import assert_no_worse_than, assert_same_bits

SHAPE = (3, 6, 2, 4, 4)


@pytest.fixture
def latents():
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(3)]


def test_the_gradient_is_the_papers_a_sample(latents):
    x0, real, fake = latents
    gradient = dmd_gradient(x0, real, fake)
    for i in range(3):
        expected = (fake[i] - real[i]) / (x0[i] - real[i]).abs().mean()
        assert_no_worse_than(gradient[i], expected, expected)


def test_the_surrogates_gradient_is_that_gradient(latents):
    x0, real, fake = latents
    x0.requires_grad_(True)
    gradient = dmd_gradient(x0, real, fake)
    assert not gradient.requires_grad
    surrogate_loss(x0, gradient).sum().backward()
    expected = gradient / x0[0].numel()
    assert_no_worse_than(x0.grad, expected, expected)


def test_a_clip_that_the_teacher_would_not_change_gives_no_gradient(latents):
    x0, _, fake = latents
    assert not dmd_gradient(x0, x0, fake).any()


def test_flow_and_x0_undo_the_noise(latents):
    x0, noise, _ = latents
    sigma = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x_t = add_noise(x0, noise, sigma)
    assert_no_worse_than(to_x0(x_t, noise - x0, sigma), x0, x0)
    assert_same_bits(flow_loss(noise - x0, x0, noise), torch.zeros(3, dtype=torch.float64))
    assert_same_bits(x0_loss(x0, x0), torch.zeros(3, dtype=torch.float64))
    error = flow_loss(noise - x0 + 2, x0, noise)
    assert_no_worse_than(error, torch.full_like(error, 4.0), torch.full_like(error, 4.0))


def test_score_levels_are_two_to_ninety_eight_percent_shifted():
    levels = score_level(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), shift=5.0)
    expected = torch.tensor([0.1 / 1.08, 2.5 / 3.0, 4.9 / 4.92], dtype=torch.float64)
    assert_no_worse_than(levels, expected, expected)
    u = torch.rand(7, dtype=torch.float64)
    assert_no_worse_than(shift_level(u, 1.0), u, u)


def test_guidance_extrapolates(latents):
    conditional, unconditional, _ = latents
    assert_no_worse_than(guide(conditional, unconditional, 1.0), conditional, conditional)
    expected = unconditional + 3 * (conditional - unconditional)
    assert_no_worse_than(guide(conditional, unconditional, 3.0), expected, expected)
