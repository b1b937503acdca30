"""A model of the bundled one's geometry that has learned nothing, with two layers and two steps."""

from dataclasses import replace

import pytest
import torch
from echo_infinity.codec import Codec, CodecConfig
from echo_infinity.config import preset
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.text import GrammarText
from echo_infinity.weights import load_checkpoint, save_checkpoint
from echo_infinity.worlds import VOCABULARY


@pytest.fixture(scope="session")
def untrained_folder(tmp_path_factory):
    """Its folder."""
    torch.manual_seed(0)
    tiny = preset("tiny")
    config = replace(tiny, model=replace(tiny.model, layers=2), sampler=replace(tiny.sampler, steps=(1000, 500)))
    codec = Codec(CodecConfig(8, encoder_width=8, encoder_deep_width=8, decoder_width=8, middle_width=8, frame_width=8))
    text = GrammarText(VOCABULARY, 24, 64)
    folder = tmp_path_factory.mktemp("models") / "untrained"
    save_checkpoint(folder, config, CausalDiT(config.model), EvolvingMemory(config.memory), text, codec)
    return folder


@pytest.fixture(scope="session")
def untrained(untrained_folder):
    """The same, loaded."""
    return load_checkpoint(untrained_folder)


@pytest.fixture
def hasty(untrained):
    """The same at one frame a second, so that a minute is five blocks."""
    return untrained._replace(config=replace(untrained.config, fps=1))
