"""The drift probe: a planted drift is found with its slope, chance is none; when a run stops."""

import pytest
import torch
from echo_infinity.evaluation.stats import Slope
from echo_infinity.training.drift import DriftProbe, should_stop, surely
from echo_infinity.weights import load_checkpoint


class Planted:
    """Stands in for the judge's streams: contrast that grows by ``slope`` of its start a minute, and noise."""

    def __init__(self, slope, noise):
        self.slope, self.noise, self.block = slope, noise, -4

    def next_block(self):
        minute = self.block * 12 / 16 / 60
        self.block += 1
        board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1.0
        amplitude = 20 * (1 + self.slope * minute) + self.noise * torch.randn(2, 12, 1, 1, 1)
        return None, (128 + amplitude * board).expand(2, 12, 3, 8, 8).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("slope", "noise"), [(1.0, 0.0), (-0.4, 0.5)])
def test_finds_a_planted_slope(student, monkeypatch, slope, noise):
    monkeypatch.setattr("echo_infinity.training.drift.Rollout", lambda *args: Planted(slope, noise))
    found = DriftProbe(("a red circle", "a blue square"), blocks=80)(student)
    middle = 1 + slope * 0.5  # the level that the slope is a share of, half a minute on
    assert found["drift"] == pytest.approx(abs(slope) / middle, rel=0.15)
    assert found["motion"] >= 0


def test_chance_is_no_drift(student, monkeypatch):
    monkeypatch.setattr("echo_infinity.training.drift.Rollout", lambda *args: Planted(0.0, 3.0))
    assert DriftProbe(("a red circle", "a blue square"), blocks=80)(student)["drift"] == 0


def test_a_real_model_is_measured(folders):
    found = DriftProbe(("a red circle drifts over a dark field",) * 2, blocks=6)(load_checkpoint(folders / "student"))
    assert set(found) == {"drift", "motion"}
    assert found["drift"] >= 0
    assert found["motion"] > 0


def test_how_steep_at_least():
    assert surely(Slope(2.0, 1.0, 3.0)) == 1.0
    assert surely(Slope(-2.0, -3.0, -1.0)) == 1.0
    assert surely(Slope(0.5, -0.1, 1.0)) == 0.0


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        ([1.0, 0.5, 0.7, 0.7], False),  # two bad probes of three
        ([1.0, 0.5, 0.7, 0.7, 0.7], True),
        ([1.0, 0.5, 0.7, 0.59, 0.7], False),  # one is within the margin
        ([0.7, 0.7, 0.7], False),  # nothing before them
    ],
)
def test_when_a_run_stops(history, stops):
    assert should_stop(history, patience=3, margin=0.1) == stops
    assert not should_stop(history, patience=0, margin=0.1)
