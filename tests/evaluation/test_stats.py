"""Intervals and slopes against what is known of synthetic series."""

import math

import numpy as np
import pytest
from echo_infinity.evaluation.stats import Share, drift_slope, wilson

HOURS = (np.arange(60) + 0.5) / 60


def planted(slope, seed, *, streams=8, noise=1.0):
    """Streams with their own levels, autocorrelated noise and one slope per hour."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(streams, len(HOURS) + 20))
    walk = np.stack([np.convolve(x, 0.5 ** np.arange(5), mode="valid") for x in steps])[:, : len(HOURS)]
    return 40 + 10 * rng.normal(size=(streams, 1)) + slope * HOURS + noise * walk


def test_wilson_interval_of_half_of_a_hundred():
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_share_of_nothing_is_unknown():
    nothing = Share(0, 0)
    assert math.isnan(nothing.share)
    assert nothing.interval == (0, 1)


def test_slope_of_a_straight_line_is_exact():
    found = drift_slope(HOURS, 3 + 7 * HOURS[None], draws=50)
    assert (found.value, found.low, found.high) == pytest.approx((7, 7, 7))


@pytest.mark.parametrize("slope", [0.0, 5.0, -2.0])
def test_planted_drift_is_found_and_its_interval_covers_it(slope):
    found = [drift_slope(HOURS, planted(slope, seed), draws=200) for seed in range(40)]
    covered = sum(x.low <= slope <= x.high for x in found)
    assert covered >= 34  # a 95 % interval of a short autocorrelated series: 34 of 40 or more
    assert np.mean([x.value for x in found]) == pytest.approx(slope, abs=0.3)
    assert np.mean([x.high - x.low for x in found]) < 4  # and it is no interval that covers everything


def test_drift_well_beyond_the_noise_is_told_from_none():
    assert drift_slope(HOURS, planted(0.0, 1)).flat
    assert not drift_slope(HOURS, planted(5.0, 1)).flat


def test_one_wild_minute_moves_the_slope_little():
    values = planted(5.0, 2, noise=0.1)
    wild = values.copy()
    wild[:, 7] = 1000
    assert drift_slope(HOURS, wild, draws=50).value == pytest.approx(
        drift_slope(HOURS, values, draws=50).value, abs=0.2
    )


def test_a_day_is_averaged_down_without_changing_the_slope():
    hours = (np.arange(1440) + 0.5) / 60
    assert drift_slope(hours, 2 * hours[None], draws=20).value == pytest.approx(2)


def test_missing_minutes_are_left_out():
    values = 3 + 7 * HOURS[None].repeat(2, 0)
    values[1, 30:] = np.nan
    assert drift_slope(HOURS, values, draws=50).value == pytest.approx(7)


def test_one_point_has_no_slope_and_shapes_must_agree():
    assert math.isnan(drift_slope(HOURS[:1], np.ones((3, 1))).value)
    with pytest.raises(ValueError, match=r"for \(60,\) times, got \(3, 5\)"):
        drift_slope(HOURS, np.ones((3, 5)))
