"""Presets and JSON; every impossible geometry is an error that names its numbers."""

import dataclasses
import json
import re

import pytest
from echo_infinity.config import (
    PRESETS,
    EchoConfig,
    ModelConfig,
    SamplerConfig,
    WindowConfig,
    memory_grid,
    preset,
)
from echo_infinity.memory import MemoryConfig

MODEL = {
    "width": 48,
    "heads": 3,
    "layers": 3,
    "ffn": 96,
    "latent_channels": 4,
    "text_tokens": 5,
    "text_width": 8,
    "time_width": 32,
}
MEMORY = {"width": 48, "heads": 3, "frames": 3, "tokens_per_frame": 12}


def config(model=None, window=None, memory=None, **fields):
    """The golden data's geometry with some fields changed; ``memory=False`` leaves memory out."""
    return EchoConfig(
        model=ModelConfig(**{**MODEL, **(model or {})}),
        window=WindowConfig(**(window or {})),
        memory=None if memory is False else MemoryConfig(**{**MEMORY, **(memory or {})}),
        **{"latent_rows": 6, "latent_columns": 8, **fields},
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    chosen = preset(name)
    assert chosen.name == name
    assert EchoConfig.from_json(chosen.to_json()) == chosen
    assert json.loads(chosen.to_json())["name"] == name


def test_every_field_survives_json():
    changed = config(
        model={"eps": 1e-5, "patch": (1, 3, 2)},
        window={"sink_frames": 4, "window_frames": 14, "frames_per_block": 2, "p_max": 33, "relative": False},
        memory={"frames": 2, "tokens_per_frame": 4, "groups": 3, "write_every": 2, "gate_bias": 0.25, "frozen": True},
        sampler=SamplerConfig(shift=3.5, steps=(900, 450.5), warp=False, solver="euler"),
        fps=24,
        name="changed",
    )
    assert EchoConfig.from_json(changed.to_json()) == changed
    assert changed != config()


def test_official_preset_has_the_official_geometry():
    c = preset("wan2.1-1.3b")
    assert (c.model.head_dim, c.grid, c.tokens_per_frame) == (128, (30, 52), 1560)
    assert (c.window.local_frames, c.memory.tokens, c.fps) == (9, 4680, 16)
    assert (c.sampler.shift, c.sampler.steps, c.sampler.solver) == (5.0, (1000, 750, 500, 250), "renoise")


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'large'; known: tiny, wan2\.1-1\.3b"):
        preset("large")


def test_configurations_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").fps = 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"layers": 0}}, "layers must be at least 1, got 0"),
        ({"model": {"width": 50}}, "width 50 is no multiple of heads 3"),
        ({"model": {"width": 45}}, "head dim 15 = 45 / 3 must be even and at least 6"),
        ({"model": {"width": 12}}, "head dim 4 = 12 / 3 must be even and at least 6"),
        ({"model": {"time_width": 31}}, "time_width must be even, got 31"),
        ({"model": {"patch": (2, 2, 2)}}, "patches must not span latent frames, got patch (2, 2, 2)"),
        ({"latent_rows": 7}, "latent 7 x 8 is no multiple of patch 2 x 2"),
        ({"latent_columns": 0}, "latent 6 x 0 is no multiple of patch 2 x 2"),
        ({"window": {"sink_frames": -1}}, "need frames_per_block >= 1 and sink_frames >= 0"),
        ({"window": {"frames_per_block": 0}}, "need frames_per_block >= 1 and sink_frames >= 0"),
        (
            {"window": {"window_frames": 5}},
            "window_frames 5 - sink_frames 3 = 2 local frames can't hold a block of 3",
        ),
        ({"window": {"window_frames": 24}}, "window_frames 24 exceeds the pretrained range p_max 21"),
        ({"memory": {"width": 24}}, "memory is 24 wide with 3 heads, the model 48 with 3"),
        ({"memory": {"heads": 4}}, "memory is 48 wide with 4 heads, the model 48 with 3"),
        ({"memory": {"groups": 4}}, "4 memory groups need at least as many layers, got 3"),
        ({"memory": {"frames": 4}}, "memory frames 4 > frames_per_block 3: ids would overlap the sink"),
        (
            {"window": {"p_max": 14}},
            "window_frames 12 + memory frames 3 = 15 exceed p_max 14: ids would overlap the sink",
        ),
        (
            {"window": {"window_frames": 13}},
            "with memory, window_frames 13 must be a multiple of frames_per_block 3",
        ),
        ({"memory": {"tokens_per_frame": 13}}, "13 memory tokens a frame can't be laid out on a grid of 3 x 4 tokens"),
        (
            {"memory": {"sink_anchor": True}, "window": {"sink_frames": 0}},
            "memory sink_anchor reads the sink, but sink_frames is 0",
        ),
    ],
)
def test_impossible_geometry_is_an_error_with_its_numbers(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"window": {"window_frames": 13}, "memory": False},
        {"window": {"window_frames": 13, "relative": False}},
        {"window": {"window_frames": 24, "relative": False}},
        {"window": {"sink_frames": 0}},
        {"window": {"sink_frames": 5}},
        {"window": {"sink_frames": 9}},
        {"window": {"window_frames": 18}},
        {"memory": {"frames": 4}, "window": {"relative": False}},
        {"memory": {"tokens_per_frame": 1}},
        {"latent_rows": 2, "latent_columns": 2, "memory": {"tokens_per_frame": 1}},
    ],
    ids=str,
)
def test_possible_geometry_at_the_edges_is_accepted(change):
    config(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "heun"}, "solver must be 'renoise' (distilled models) or 'euler', got 'heun'"),
        ({"steps": ()}, "steps must fall from noise to clean and not be empty, got ()"),
        ({"steps": (750, 1000)}, "steps must fall from noise to clean and not be empty, got (750, 1000)"),
        ({"steps": (1001, 500)}, "steps must lie in 0 .. 1000, got (1001, 500)"),
        ({"steps": (500, -1)}, "steps must lie in 0 .. 1000, got (500, -1)"),
        ({"shift": 0.0}, "shift must be positive, got 0.0"),
    ],
)
def test_impossible_sampler_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplerConfig(**change)


def changed_json(**fields):
    return json.dumps({**json.loads(preset("tiny").to_json()), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a valid Echo configuration"),
        ("[]", "not a valid Echo configuration"),
        ("{}", "not a valid Echo configuration: KeyError('model')"),
        (changed_json(colour="blue"), "unexpected keyword argument 'colour'"),
        (changed_json(window={"frames": 3}), "unexpected keyword argument 'frames'"),
        (changed_json(model={"width": 8}), "missing 6 required positional arguments"),
        (changed_json(latent_rows="8"), "not a valid Echo configuration: TypeError"),
        (changed_json(latent_rows=7), "latent 7 x 8 is no multiple of patch 2 x 2"),
    ],
)
def test_json_that_is_no_configuration_is_an_error(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EchoConfig.from_json(text)


@pytest.mark.parametrize(
    ("tokens", "grid", "expected"),
    [
        (1560, (30, 52), (30, 52)),
        (390, (30, 52), (15, 26)),
        (1, (30, 52), (1, 1)),
        (4, (2, 8), (1, 4)),
        (6, (3, 4), (2, 3)),
    ],
)
def test_memory_tokens_keep_the_frames_aspect(tokens, grid, expected):
    assert memory_grid(tokens, grid) == expected
