"""Settings: defaults, files, options, in that order; bundled files fit their stages."""

import argparse
import json
from dataclasses import dataclass

import pytest
from echo_infinity.config import PRESETS
from echo_infinity.training.distill import Distillation
from echo_infinity.training.flow import FlowTraining
from echo_infinity.training.init import Initialisation
from echo_infinity.training.long import LongTuning
from echo_infinity.training.options import add_settings, read_settings

STAGES = {
    **{"flow": FlowTraining, "teacher": FlowTraining, "init": Initialisation},
    **{"distill": Distillation, "long": LongTuning},
}


@dataclass(frozen=True)
class Sample:
    count: int = 3
    rate: float = 0.5
    name: str = "a"
    fast: bool = True
    levels: tuple[float, ...] = (2.0, 1.0)


def read(*words, cls=Sample, stage="flow"):
    parser = argparse.ArgumentParser()
    add_settings(parser, cls, stage)
    return read_settings(cls, parser.parse_args(words), stage)


def test_options_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"count": 5, "rate": 1, "levels": [3, 2]}))
    assert read() == Sample()
    assert read("--config", str(file)) == Sample(5, 1.0, "a", True, (3, 2))
    given = ["--config", str(file), "--count", "7", "--no-fast", "--levels", "9,8,7", "--name", "b"]
    assert read(*given) == Sample(7, 1.0, "b", False, (9.0, 8.0, 7.0))


def test_a_wrong_file_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"counts": 5, "rat": 1}')
    with pytest.raises(ValueError, match="has no setting counts, rat"):
        read("--config", str(file))
    file.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read("--config", str(file))
    with pytest.raises(ValueError, match="no settings 'huge'"):
        read("--config", "huge")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_preset_has_settings_for_every_stage(preset, stage):
    settings = read("--config", preset, cls=STAGES[stage], stage=stage)
    assert settings != STAGES[stage]() or (preset, stage) == ("wan2.1-1.3b", "distill")


def test_the_official_presets_rates_are_the_papers():
    stage1 = read("--config", "wan2.1-1.3b", cls=Distillation, stage="distill")
    assert (stage1.rate, stage1.rate * stage1.memory_rate, stage1.fake_rate) == pytest.approx((2e-6, 1e-5, 4e-7))
    assert (stage1.ratio, stage1.guidance, stage1.ema, stage1.chunk, stage1.shift) == (5, 3.0, 0.99, 21, 5.0)
    stage2 = read("--config", "wan2.1-1.3b", cls=LongTuning, stage="long")
    assert (stage2.rate, stage2.rate * stage2.memory_rate, stage2.fake_rate) == pytest.approx((1e-5, 5e-5, 2e-6))
    assert (stage2.rank, stage2.frames, stage2.chunk - stage2.overlap) == (256, 240, 18)
