"""Model folders: what is saved loads bit for bit, and whatever is wrong with a file is named."""

import json
from dataclasses import replace

import pytest
import torch
from echo_infinity.codec import Codec
from echo_infinity.config import preset
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.text import GrammarText
from echo_infinity.weights import CODEC, CONFIG, MODEL, load_checkpoint, save_checkpoint
from numerics import assert_same_bits
from safetensors.torch import load_file, save_file


@pytest.fixture
def saved(tmp_path):
    config = preset("tiny")
    parts = CausalDiT(config.model), EvolvingMemory(config.memory), GrammarText(["a", "red"], 24, 64)
    save_checkpoint(tmp_path, config, *parts, Codec())
    return tmp_path, parts


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"vocabulary": json.dumps(["a", "red"])})


def test_round_trip_is_bit_exact(saved):
    folder, parts = saved
    loaded = load_checkpoint(folder)
    for part, back in zip(parts, (loaded.model, loaded.memory, loaded.text), strict=True):
        assert_same_bits(dict(back.state_dict()), dict(part.state_dict()))
    assert loaded.config == preset("tiny")


def test_every_wrong_tensor_is_listed(saved):
    folder, _ = saved

    def change(tensors):
        del tensors["model.head.head.bias"]
        tensors["model.query_memory_encoder.to_k.bias"] = torch.zeros(7)
        tensors["model.extra"] = torch.zeros(1)

    rewrite(folder / MODEL, change)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the three names below are the match
        load_checkpoint(folder)
    for line in (
        "missing model.head.head.bias",
        r"model.query_memory_encoder.to_k.bias is (7,), expected (128,)",
        "unexpected model.extra",
    ):
        assert line in str(error.value)


def test_fingerprint_follows_the_weights(saved):
    folder, _ = saved
    before = load_checkpoint(folder).fingerprint
    rewrite(folder / MODEL, lambda tensors: tensors["model.head.head.bias"].add_(1))
    assert load_checkpoint(folder).fingerprint != before


@pytest.mark.parametrize("name", [MODEL, CODEC])
def test_truncated_file_is_named(saved, name):
    folder, _ = saved
    path = folder / name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=name):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", [MODEL, CODEC])
def test_missing_file_is_named(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load_checkpoint(folder)


def test_configuration_that_is_no_json_is_refused(saved):
    folder, _ = saved
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not a valid Echo configuration"):
        load_checkpoint(folder)


def test_codec_of_another_width_is_refused(saved):
    folder, _ = saved
    config = Codec().config
    Codec(replace(config, latent_channels=4)).save(folder / CODEC)
    with pytest.raises(ValueError, match="codec has 4 latent channels, the model 8"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing-like-this", "neither a bundled one"), ("wan2.1-1.3b", "ships without weights")],
)
def test_unknown_names_say_what_is_known(name, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(name)


def test_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path)
