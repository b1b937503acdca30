"""What every policy owes: constant cost, a stream that saves and resumes, training through its tier, clear errors."""

from dataclasses import replace

import pytest
import torch
from echo_infinity.config import EchoConfig, WindowConfig
from echo_infinity.functional import FunctionalKV
from echo_infinity.noise import counter_noise
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.policies import POLICIES, find_policy, make_generator, make_sampler
from echo_infinity.weights import load_checkpoint, save_checkpoint
from numerics import assert_no_worse_than, assert_same_bits
from seen import LEVELS, encode, make_checkpoint, run_calls, sampler
from small import CIRCLE, save_small

ENDLESS = [name for name in POLICIES if name != "full"]
TIERS = ["ema", "pooled", "rolling"]


def test_the_registry():
    assert list(POLICIES) == ["window", "sink", "ema", "pooled", "rolling", "frozen", "evolving", "full"]
    assert all(policy.name == name for name, policy in POLICIES.items())
    with pytest.raises(ValueError, match="unknown policy 'best'; known: window, sink"):
        find_policy("best")


@pytest.mark.parametrize("name", POLICIES)
def test_a_configuration_keeps_its_policy(name):
    config = POLICIES[name].configure(make_checkpoint().config)
    assert config.policy == name
    assert POLICIES[name].configure(config) == config
    assert EchoConfig.from_json(config.to_json()) == config
    if name != "evolving":
        other = "sink" if name == "window" else "window"
        with pytest.raises(ValueError, match=f"trained under the policy '{name}', not '{other}'"):
            POLICIES[other].configure(config)


def test_the_default_policy_leaves_configurations_as_they_were_written():
    assert "policy" not in make_checkpoint().config.to_json()


def test_a_model_without_memory_runs_under_every_policy_that_needs_none():
    checkpoint = make_checkpoint(memory=False)
    for name in POLICIES:
        if name in ("frozen", "evolving"):
            with pytest.raises(ValueError, match="needs a model with a memory"):
                make_generator(checkpoint, name)
        else:
            make_generator(checkpoint, name)
    assert make_generator(checkpoint).memory is None


@pytest.mark.parametrize("name", TIERS)
def test_a_window_that_leaves_in_parts_of_blocks_is_refused(name):
    config = make_checkpoint(WindowConfig(sink_frames=1, window_frames=9, p_max=13)).config
    with pytest.raises(ValueError, match="sink_frames 1 and window_frames 9 to be multiples of frames_per_block 3"):
        POLICIES[name].configure(config)
    tight = replace(make_checkpoint(memory=False).config, window=WindowConfig(p_max=14))
    with pytest.raises(ValueError, match=r"window_frames 12 \+ 3 memory frames exceed p_max 14"):
        POLICIES[name].configure(tight)


@pytest.mark.parametrize("name", ENDLESS)
def test_state_and_attention_are_constant_in_size(name, monkeypatch):
    keys = []

    def count(q, *, sink, memory, ring, **rest):
        keys.append(sum(t[0].shape[1] for t in (sink, memory, ring) if t is not None))
        return torch.zeros_like(q)

    monkeypatch.setattr("echo_infinity.cache.stream_attention", count)
    stream = sampler(name, make_checkpoint(dtype=torch.float32))
    sizes = []
    for _ in range(60):
        stream.next_block()
        sizes.append((sum(x.nbytes for x in stream.tensors().values()), keys[-1]))
    assert len(set(sizes[20:])) == 1


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("blocks", [2, 7])
def test_a_saved_stream_goes_on_bit_for_bit(name, blocks):
    checkpoint = make_checkpoint(dtype=torch.float32)
    whole, resumed = (sampler(name, checkpoint, batch=2) for _ in range(2))
    for _ in range(blocks):
        whole.next_block()
    resumed.load_tensors({k: x.clone() for k, x in whole.tensors().items()}, whole.frame)
    for _ in range(6):
        assert_same_bits(resumed.next_block(), whole.next_block())
    assert_same_bits(resumed.tensors(), whole.tensors())


@pytest.mark.parametrize("name", TIERS)
def test_a_tier_of_another_model_is_refused(name):
    stream = sampler(name, make_checkpoint(dtype=torch.float32))
    for _ in range(6):
        stream.next_block()
    tensors = stream.memory.tensors()
    with pytest.raises(ValueError, match=r"saved memory is \(2, 1, \d+, 2, 6\), this one \(2, 1, n, 2, 12\)"):
        stream.memory.load_tensors(tensors | {"k": tensors["k"][..., :6]})
    with pytest.raises(ValueError, match="a saved memory lacks end"):
        stream.memory.load_tensors({n: x for n, x in tensors.items() if n != "end"})
    with pytest.raises(ValueError, match="a saved memory lacks k and v"):
        stream.memory.load_tensors({n: x for n, x in tensors.items() if n != "v"})


@pytest.mark.parametrize("name", POLICIES)
def test_a_switch_with_a_new_memory_starts_from_the_window(name):
    """After it, what was outside the window no longer matters."""
    checkpoint = make_checkpoint(dtype=torch.float32)
    streams = [sampler(name, checkpoint) for _ in range(2)]
    for stream in streams:
        for _ in range(8):
            stream.next_block()
    if streams[1].memory is not None and (tier := getattr(streams[1].memory, "state", None)) is not None:
        if name in TIERS:
            streams[1].memory.state = type(tier)(*(torch.randn_like(x) for x in tier))
        else:
            streams[1].memory.replace(torch.randn_like(tier))
    for stream in streams:
        stream.switch(encode(checkpoint), memory_recache=True)
    assert_same_bits(streams[1].next_block(), streams[0].next_block())


@pytest.mark.parametrize("name", ["ema", "pooled"])
def test_a_re_cached_tier_holds_the_window(name):
    checkpoint = make_checkpoint()
    stream = sampler(name, checkpoint)
    for _ in range(8):
        stream.next_block()
    before = stream.memory.state.v
    stream.switch(encode(checkpoint), memory_recache=True)
    local = stream.cache.held(range(stream.frame - 9, stream.frame))
    v = torch.stack([pair[1] for pair in local])
    if name == "pooled":
        expected = v.unflatten(2, (9, 4)).mean(3)  # a frame is one cell
    else:
        blocks = v.unflatten(2, (3, 12)).unbind(2)
        expected = 0.81 * blocks[0] + 0.09 * blocks[1] + 0.1 * blocks[2]
    assert_no_worse_than(stream.memory.state.v, expected, expected)
    assert before.shape != expected.shape or (before - expected).abs().max() > 0.01


# Frames 3 to 5 leave the window at block 4: the last of so many blocks still depends on them, or not.
REACH = [
    *[("window", 9, False), ("sink", 7, False), ("frozen", 9, False), ("full", 15, True), ("evolving", 15, True)],
    *[("ema", 15, True), ("pooled", 7, True), ("pooled", 15, False), ("rolling", 15, True)],
]


@pytest.mark.parametrize(("name", "blocks", "reaches"), REACH)
def test_training_goes_back_through_what_left(name, blocks, reaches):
    checkpoint = make_checkpoint()
    policy, model = POLICIES[name], checkpoint.model
    config, module = policy.configure(checkpoint.config), policy.module(checkpoint.memory)
    geometry = make_generator(checkpoint, name).geometry
    levels = [model.condition(torch.full((1, 1), t)) for t in LEVELS]
    inputs = [[torch.randn(1, 3, 2, 4, 4, dtype=torch.float64) for _ in LEVELS] for _ in range(blocks)]
    inputs[1][-1].requires_grad_(True)  # clean latents of frames 3 to 5
    recall = policy.recall(module, config, 1)
    flows = run_calls(model, FunctionalKV(config), recall, geometry, encode(checkpoint), levels, inputs)
    flows[-1].square().sum().backward()
    gradient = inputs[1][-1].grad
    assert (gradient is not None and gradient.abs().sum() > 0) == reaches
    assert all(x.grad.abs().sum() > 0 for x in model.layers()[0].self_attn.parameters())
    if recall is not None:
        recall.detach()
        assert all(not x.requires_grad for x in recall.tensors().values())


@pytest.mark.parametrize("name", POLICIES)
def test_a_model_folder_streams_under_its_policy(name, tmp_path):
    base = load_checkpoint(save_small(tmp_path / "base"))
    config = POLICIES[name].configure(base.config)
    memory = base.memory if config.memory is not None else None
    save_checkpoint(tmp_path / "model", config, base.model, memory, base.text, base.codec)
    pipe = EchoPipeline.from_pretrained(tmp_path / "model")
    with pipe.stream(CIRCLE, output_type="latents") as stream:
        blocks = torch.stack([next(stream) for _ in range(7)])
    text = base.model.encode_text(base.text.encode([CIRCLE]))
    expected = make_sampler(base, name, text, counter_noise(0))
    assert_same_bits(blocks, torch.stack([expected.next_block()[0].clone() for _ in range(7)]))
