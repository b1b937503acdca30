"""The golden data's geometry, with its weights: D 48, 3 heads x 16, 3 layers, 12 tokens a frame."""

import json
from pathlib import Path

import torch
from echo_infinity.config import EchoConfig, ModelConfig, SamplerConfig, WindowConfig
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.sampler import BlockSampler
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def load(name):
    """Settings and tensors of one golden file pair."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def micro_config(settings, **window):
    """Our configuration of a golden rollout's settings."""
    memory = settings["memory"]
    return EchoConfig(
        model=ModelConfig(
            width=48, heads=3, layers=3, ffn=96, latent_channels=4, text_tokens=5, text_width=8, time_width=32
        ),
        latent_rows=6,
        latent_columns=8,
        window=WindowConfig(
            sink_frames=settings["sink_size"],
            window_frames=settings["local_attn_size"],
            frames_per_block=settings["block"],
            p_max=settings["pmax"],
            relative=settings["relative_rope"],
            **window,
        ),
        memory=None
        if memory is None
        else MemoryConfig(
            width=48,
            heads=3,
            frames=memory["Q_frames"],
            tokens_per_frame=memory["tokens_per_frame"],
            layers=memory["n_encoder_layers"],
            groups=memory["num_query_groups"],
            normalise_keys=memory["normalize_memory_k"],
            residual=memory.get("use_residual_update", False),
            sink_anchor=memory.get("use_sink_anchor", False),
        ),
        sampler=SamplerConfig(shift=settings["shift"]),
    )


def micro_generator(settings):
    """Generator with the golden weights."""
    config = micro_config(settings)
    weights = load_file(GOLDEN / settings["generator_weights"])
    model = CausalDiT(config.model)
    model.load_state_dict({name.removeprefix("model."): x for name, x in weights.items()})
    memory = None
    if config.memory is not None:
        memory = EvolvingMemory(config.memory)
        memory.load_state_dict(load_file(GOLDEN / settings["encoder_weights"]))
    return Generator(config, model.eval(), memory)


def golden_noise(tensors, frames_per_block=3):
    """The golden file's own noise, in the order it was drawn: 3 re-noisings a block."""

    def noise(block, step, shape):
        if step == 0:
            first = block * frames_per_block
            return tensors["noise"][:, first : first + frames_per_block].clone()
        return tensors["renoise"][block * 3 + step - 1].view(shape).clone()

    return noise


class Recorder(torch.nn.Module):
    """Stands in for the model and keeps every call's flow; runs context passes to the end, as the golden data does."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head, self.flows = model, model.head, []

    def condition(self, t):
        return self.model.condition(t)

    def forward(self, x, level, text, cache, call, memory=None, *, output=True):
        flow = self.model(x, level, text, cache, call, memory, output=True)
        self.flows.append(flow)
        return flow


def micro_stream(name):
    """A recording stream of a golden rollout: (settings, tensors, recorder, sampler)."""
    settings, tensors = load(name)
    generator = micro_generator(settings)
    recorder = Recorder(generator.model)
    generator.model = recorder
    text = recorder.model.encode_text(tensors["text"][:1])
    return settings, tensors, recorder, BlockSampler(generator, text, golden_noise(tensors))
