"""The model that ships with the package: small files, the preset's geometry, and a memory that recalls."""

from importlib.resources import files
from pathlib import Path

import pytest
from echo_infinity.config import preset
from echo_infinity.evaluation.recall import RecallTest, recall
from echo_infinity.weights import load_checkpoint

FOLDER = Path(str(files("echo_infinity"))) / "weights" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint("tiny")


def test_has_the_presets_geometry_and_small_files(tiny):
    assert tiny.config == preset("tiny")
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "codec.safetensors", "README.md"} <= names
    assert all(path.stat().st_size <= 10_000_000 for path in FOLDER.iterdir())


def test_recalls_colours_after_an_absence_longer_than_the_window(tiny):
    test = RecallTest(scenes=24, batch=24)
    on, off, swapped = (recall(tiny, test, mode) for mode in ("on", "off", "swapped"))
    assert on.colour >= 0.5
    assert max(off.colour, swapped.colour) <= 0.35
