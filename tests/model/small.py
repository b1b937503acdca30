"""A small generator with random weights: 32 x 32 pixels, 2 layers, 4 tokens a frame."""

import functools
import tempfile

import torch
from echo_infinity.codec import Codec, CodecConfig
from echo_infinity.config import EchoConfig, ModelConfig, SamplerConfig
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.text import GrammarText
from echo_infinity.weights import save_checkpoint
from echo_infinity.worlds.grammar import VOCABULARY

CIRCLE = "a red circle drifts over a dark field"
SQUARE = "a blue square drifts over a dark field"


def small_config(*, memory=True, write_every=1, solver="renoise"):
    """Geometry of the small generator; its id range is the smallest that its window and memory allow."""
    return EchoConfig(
        name="small",
        model=ModelConfig(
            width=24, heads=2, layers=2, ffn=32, latent_channels=4, text_tokens=12, text_width=8, time_width=16
        ),
        latent_rows=4,
        latent_columns=4,
        memory=MemoryConfig(
            width=24, heads=2, frames=3, tokens_per_frame=4, gate_bias=0.0, positions=True, write_every=write_every
        )
        if memory
        else None,
        sampler=SamplerConfig(solver=solver),
    )


def save_small(folder, seed=0, **settings):
    """Write the small generator's checkpoint and return the folder."""
    torch.manual_seed(seed)
    config = small_config(**settings)
    codec = Codec(CodecConfig(4, encoder_width=4, encoder_deep_width=4, decoder_width=8, middle_width=4, frame_width=4))
    model = CausalDiT(config.model)
    memory = None if config.memory is None else EvolvingMemory(config.memory)
    if memory is not None:  # a start far from zero: what the memory holds must show in the frames
        torch.nn.init.normal_(memory.query_init)
    text = GrammarText(VOCABULARY, config.model.text_tokens, config.model.text_width)
    save_checkpoint(folder, config, model, memory, text, codec)
    return folder


@functools.cache
def small_pipe(**settings):
    """The small generator, loaded; one for each choice of settings."""
    with tempfile.TemporaryDirectory() as folder:
        return EchoPipeline.from_pretrained(save_small(folder, **settings))
