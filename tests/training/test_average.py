"""Averages of models: the mean of every weight, with the last one's sampler; others are refused."""

import pytest
import torch
from echo_infinity.cli import main
from echo_infinity.training.average import average
from echo_infinity.training.rollout import few_steps
from echo_infinity.weights import load_checkpoint, save_checkpoint

from tests.numerics import assert_same_bits

PARTS = ("model", "memory", "text")


def weights(model):
    return {f"{part}.{name}": x for part in PARTS for name, x in getattr(model, part).named_parameters()}


@pytest.fixture
def tuned(folders, tmp_path):
    """The folder of a student that went on from the shared one: other weights, a distilled one's sampler."""
    model = load_checkpoint(folders / "student")
    torch.manual_seed(5)
    with torch.no_grad():
        for x in weights(model).values():
            x.add_(0.1 * torch.randn_like(x))
    config = few_steps(model.config, (1000, 500))
    save_checkpoint(tmp_path / "tuned", config, model.model, model.memory, model.text, model.codec)
    return tmp_path / "tuned"


def test_the_command_writes_the_mean_of_all_weights_with_the_last_ones_sampler(folders, tuned, tmp_path, capsys):
    first, last = load_checkpoint(folders / "student"), load_checkpoint(tuned)
    words = ["train", "average", "--models", folders / "student", tuned, "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert str(tmp_path / "out" / "model") in capsys.readouterr().out
    found = load_checkpoint(tmp_path / "out" / "model")
    expected = {name: (a.double() + weights(last)[name].double()) / 2 for name, a in weights(first).items()}
    assert_same_bits(weights(found), {name: x.to(weights(found)[name].dtype) for name, x in expected.items()})
    assert found.config == last.config != first.config


def test_models_of_one_kind_and_more_than_one_are_needed(folders, student, teacher):
    with pytest.raises(ValueError, match="two models or more"):
        average([student])
    with pytest.raises(ValueError, match="different geometry"):
        average([student, teacher])
    other = load_checkpoint(folders / "student")
    other.text.vocabulary = [*other.text.vocabulary[:-1], "unheard"]
    with pytest.raises(ValueError, match="different words"):
        average([student, other])
