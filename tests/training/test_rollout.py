"""The student's rollout in training: the sampler's bits, and gradients where the method wants them."""

import itertools

import pytest
import torch
from echo_infinity.cache import Geometry
from echo_infinity.noise import counter_noise
from echo_infinity.policies import POLICIES, make_sampler
from echo_infinity.training.denoiser import encode_prompts
from echo_infinity.training.passes import StreamPasses
from echo_infinity.training.rollout import Levels, few_steps, roll_out
from echo_infinity.weights import load_checkpoint
from numerics import assert_golden, assert_same_bits

FRAMES = 3


@pytest.fixture
def model(folders):
    """The student as a fresh copy whose weights want gradients."""
    loaded = load_checkpoint(folders / "student")
    for part in (loaded.model, loaded.memory):
        part.requires_grad_(True)
    return loaded._replace(config=few_steps(loaded.config, (1000, 750, 500, 250)))


def start(model, prompts, policy="evolving"):
    config = POLICIES[policy].configure(model.config)
    recall = POLICIES[policy].recall(POLICIES[policy].module(model.memory), config, len(prompts))
    text = encode_prompts(model.model, model.text, prompts)
    return StreamPasses(model.model, Geometry(config), recall, text)


def counted(seed, batch):
    """The sampler's noise, in the order in which a rollout with all steps draws it."""
    noise, shape = counter_noise(seed), (batch, FRAMES, 4, 4, 4)
    return iter([noise(block, step, shape) for block, step in itertools.product(range(9), range(4))]).__next__


@pytest.mark.parametrize("policy", POLICIES)
def test_with_all_steps_it_is_the_sampler(model, prompts, policy):
    stream = start(model, prompts[:2], policy)
    with torch.no_grad():
        clip = roll_out(stream, Levels(model.config), 3, 8, counted(5, 2), grad=False)
    sampler = make_sampler(model, policy, stream.text, counter_noise(5), 2)
    assert_golden(clip, torch.cat([sampler.next_block() for _ in range(8)], dim=1).clone())


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_the_values_do_not_depend_on_wanting_a_gradient(model, prompts, exit_step):
    levels = Levels(model.config)
    plain = roll_out(start(model, prompts), levels, exit_step, 7, counted(0, 3), grad=False)
    graded = roll_out(start(model, prompts), levels, exit_step, 7, counted(0, 3), grad=True)
    assert graded.requires_grad
    assert not plain.requires_grad
    assert_golden(graded.detach(), plain)


def test_the_last_blocks_gradient_reaches_the_memory_through_several_evictions(model, prompts):
    """21 frames: evictions at blocks 4, 5 and 6; what was written at block 4 has been blended twice by the last."""
    levels, memory = Levels(model.config), model.memory
    states = []
    stream = start(model, prompts)
    write = memory.write

    def watched(state, *args, **rest):
        state.retain_grad()
        states.append(state)
        return write(state, *args, **rest)

    memory.write = watched
    clip = roll_out(stream, levels, 2, 7, counted(0, 3), grad=True)
    clip[:, -FRAMES:].square().sum().backward()
    assert len(states) == 3
    assert all(state.grad.abs().sum() > 0 for state in states)
    for name, x in memory.named_parameters():
        assert x.grad is not None, name
        assert x.grad.abs().sum() > 0, name


def test_blocks_hang_together_by_the_memory_alone(model, prompts):
    """Context passes carry no gradient: without memory no block's loss reaches another block's call."""
    for policy, linked in (("evolving", True), ("sink", False), ("ema", False)):
        stream = start(model, prompts, policy)
        calls = []
        flow = stream.flow

        def watched(x, condition, calls=calls, flow=flow):
            x = x.clone().requires_grad_(True)
            calls.append(x)
            return flow(x, condition)

        stream.flow = watched
        clip = roll_out(stream, Levels(model.config), 0, 7, counted(0, 3), grad=True)
        loss = clip[:, -FRAMES:].square().sum()
        found = torch.autograd.grad(loss, calls, allow_unused=True)
        assert [x is not None and bool(x.abs().sum() > 0) for x in found] == [False] * 6 + [True]
        before = stream.recall.state if policy == "evolving" else None
        assert (before is not None and before.requires_grad) == linked


def test_only_the_exit_call_carries_gradient(model, prompts):
    stream = start(model, prompts)
    seen = []
    flow = stream.flow

    def watched(x, condition):
        seen.append(torch.is_grad_enabled())
        return flow(x, condition)

    stream.flow = watched
    roll_out(stream, Levels(model.config), 2, 3, counted(0, 3), grad=True)
    assert seen == [False, False, True] * 3


def test_a_rollout_in_parts_is_the_whole(model, prompts):
    levels = Levels(model.config)
    draw = counted(0, 3)
    whole = roll_out(start(model, prompts), levels, 3, 8, counted(0, 3), grad=False)
    stream = start(model, prompts)
    parts = []
    for blocks in (5, 3):
        parts.append(roll_out(stream, levels, 3, blocks, draw, grad=True).detach())
        stream.detach()
        assert all(not x.requires_grad for x in stream.recall.tensors().values())
        assert all(not x.requires_grad for x in stream.cache.tensors().values())
    assert_golden(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_a_switch_is_the_samplers(model, prompts):
    stream = start(model, prompts[:2])
    levels, draw = Levels(model.config), counted(7, 2)
    clip = roll_out(stream, levels, 3, 6, draw, grad=False)
    sampler = make_sampler(model, None, stream.text, counter_noise(7), 2)
    for _ in range(6):
        sampler.next_block()
    text = encode_prompts(model.model, model.text, prompts[1:])
    stream.switch(text, clip[:, -9:], model.model.condition(torch.zeros(1, 1)))
    sampler.switch(text)
    after = roll_out(stream, levels, 3, 2, draw, grad=False)
    assert_golden(after, torch.cat([sampler.next_block() for _ in range(2)], dim=1).clone())


def test_a_switch_before_the_window_is_full_is_refused(model, prompts):
    stream = start(model, prompts)
    clip = roll_out(stream, Levels(model.config), 0, 3, counted(0, 3), grad=False)
    with pytest.raises(ValueError, match="needs a full window"):
        stream.switch(stream.text, clip, model.model.condition(torch.zeros(1, 1)))


def test_a_twin_goes_on_from_saved_tensors(model, prompts):
    levels, draw = Levels(model.config), counted(0, 3)
    stream = start(model, prompts)
    roll_out(stream, levels, 3, 5, draw, grad=False)
    twin = start(model, prompts)
    twin.frame = stream.frame
    twin.cache.load_tensors(stream.cache.tensors())
    twin.recall.load_tensors(stream.recall.tensors())
    noises = [draw() for _ in range(8)]
    ours, theirs = (roll_out(s, levels, 3, 2, iter(noises).__next__, grad=False) for s in (stream, twin))
    assert_same_bits(ours, theirs)
