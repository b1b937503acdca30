"""The drift probe: a planted drift is found with its slope, a steady video has none; when a run stops."""

import pytest
import torch
from echo_infinity.training.drift import DriftProbe, should_stop, theil_sen


class Planted:
    """Stands in for sampler and codec: frames whose saturation grows by ``slope`` of its start a minute."""

    def __init__(self, slope):
        self.slope, self.block = slope, 0

    def next_block(self):
        self.block += 1
        return torch.tensor(float(self.block))

    def decode(self, latents, state):
        minute = latents.item() * 12 / 16 / 60
        frames = torch.zeros(1, 12, 3, 4, 4)
        frames[:, :, 0] = (40 * (1 + self.slope * minute) + 20 * torch.eye(4)) / 127.5
        return frames - 1, state


@pytest.mark.parametrize("slope", [0.0, 0.5, 2.0])
def test_finds_a_planted_slope(student, monkeypatch, slope):
    planted = Planted(slope)
    monkeypatch.setattr("echo_infinity.training.drift.make_sampler", lambda *args: planted)
    found = DriftProbe(("a red circle",), blocks=40)(student._replace(codec=planted))
    # relative to the median saturation of the half minute, which has grown itself; colours are rounded to 1 / 255
    half = 20.5 * 12 / 16 / 60
    assert found == pytest.approx(slope * 40 / (45 + 40 * slope * half), abs=0.1)


def test_theil_sen_ignores_outliers():
    values = 3.0 * torch.arange(20.0)
    values[4] = 1000
    assert theil_sen(values).item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        ([1.0, 0.5, 0.7, 0.7], False),  # two bad probes of three
        ([1.0, 0.5, 0.7, 0.7, 0.7], True),
        ([1.0, 0.5, 0.7, 0.6, 0.7], False),  # one is within the margin
        ([0.7, 0.7, 0.7], False),  # nothing before them
    ],
)
def test_when_a_run_stops(history, stops):
    assert should_stop(history, patience=3, margin=0.25) == stops
    assert not should_stop(history, patience=0, margin=0.25)
