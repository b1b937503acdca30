"""Measures known by hand on synthetic sets."""

import pytest
import torch
from echo_infinity.evaluation.features import block_features, contrast, frechet, motion, saturation, sharpness


def test_frechet_of_shifted_gaussians_is_the_squared_shift():
    x = torch.randn(4000, 3, dtype=torch.float64)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + torch.tensor([3.0, 0, 4.0])) == pytest.approx(25, rel=1e-6)


def test_frechet_of_scaled_gaussian_is_the_difference_of_spreads():
    x = torch.randn(2000, 1, dtype=torch.float64)
    spread = x.T.cov().sqrt().item()
    centred = x - x.mean()
    assert frechet(centred, 3 * centred) == pytest.approx((2 * spread) ** 2, rel=1e-6)


def test_frechet_needs_two_rows_of_one_width():
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet(torch.zeros(1, 3), torch.zeros(5, 3))


def test_motion_of_a_frozen_video_is_zero_and_of_a_blinking_one_its_step():
    frozen = torch.full((1, 5, 3, 8, 8), 7, dtype=torch.uint8)
    blinking = frozen.clone()
    blinking[:, 1::2] += 10
    assert motion(torch.cat([frozen, blinking])).tolist() == [0, 10]


def test_features_of_a_constant_block_have_no_spread_and_no_change():
    x = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 3, 4, 8, 8)
    assert block_features(x)[0].tolist() == [0, 1, 2, 3, *[0] * 8]


def painted(*colours):
    """A frame of vertical stripes, two columns each."""
    columns = torch.tensor(colours, dtype=torch.uint8).repeat_interleave(2, 0)  # (W, 3)
    return columns.T[None, None, :, None, :].expand(1, 1, 3, 8, -1)


def test_saturation_is_hsvs_in_percent():
    assert saturation(painted((200, 100, 100), (0, 0, 0))).item() == pytest.approx(25)
    assert saturation(painted((90, 90, 90))).item() == 0
    assert saturation(painted((0, 255, 0))).item() == pytest.approx(100)


def test_contrast_of_black_and_white_stripes_is_half_the_range():
    assert contrast(painted((0, 0, 0), (255, 255, 255))).item() == pytest.approx(127.5, rel=1e-5)
    assert contrast(painted((7, 7, 7), (7, 7, 7))).item() == pytest.approx(0, abs=1e-4)


def test_sharpness_is_the_laplacian_and_falls_with_blur():
    stripes = painted(*[(0, 0, 0), (100, 100, 100)] * 4)
    assert sharpness(stripes).item() == pytest.approx(100, rel=1e-5)  # every inner column is next to an edge
    blurred = torch.nn.functional.avg_pool2d(stripes[0].float(), 3, 1, 1)[None].to(torch.uint8)
    assert sharpness(blurred).item() < 50
    ramp = torch.arange(0, 64, 4, dtype=torch.uint8).expand(1, 2, 3, 8, -1)
    assert sharpness(ramp).item() == pytest.approx(0, abs=1e-4)
