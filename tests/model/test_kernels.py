"""A miniature model with every op on its kernel: golden rollouts in float32, and bfloat16 call by call."""

import copy

import pytest
import torch
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler
from micro import load, micro_generator
from numerics import assert_no_worse_than
from test_rollout import test_prompt_switch_matches_golden_data as assert_switch
from test_rollout import test_rollout_matches_golden_data as assert_rollout

REFERENCES = [
    ("rope", "rope_rotate_ref"),
    ("ring", "ring_append_ref"),
    ("attention", "_merge_tiers"),
    ("norm", "modulate_ref"),
    ("norm", "gated_add_ref"),
    ("norm", "gated_modulate_ref"),
    ("memory", "_read_in_place"),
    ("gate", "gate_blend_ref"),
]


@pytest.fixture
def kernels_only(emulated, monkeypatch):
    """The emulator, with PyTorch's ways barred."""

    def refuse(*args, **kwargs):
        pytest.fail("an op fell back to PyTorch")

    for module, name in REFERENCES:
        monkeypatch.setattr(f"echo_ext.{module}.{name}", refuse)
    emulated.configure(race=False)  # each kernel's own tests look for races; here that would take a minute
    return emulated


def test_rollout_by_kernels_matches_golden_data(kernels_only):
    assert_rollout("rollout_mem_nk1")
    assert kernels_only.counters().launches > 1000


@pytest.mark.parametrize("emulated", ["fast"], indirect=True)
def test_prompt_switch_by_kernels_matches_golden_data(kernels_only):
    assert_switch("switch_f21_recache1_gsink1")
    assert kernels_only.counters().launches > 1000


class CallByCall(torch.nn.Module):
    """Stands in for the model of a reference stream: notes each call's inputs, and what the call gives."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head, self.calls = model, model.head, []

    def condition(self, t):
        return self.model.condition(t)

    def forward(self, x, level, text, cache, call, memory=None, *, output=True):
        before = copy.deepcopy((x, level, text, cache, call, memory))
        out = self.model(x, level, text, cache, call, memory, output=output)
        self.calls.append((before, out, copy.deepcopy(cache.tensors())))
        return out


def test_each_bfloat16_call_by_kernels_errs_no_more_than_pytorch(emulated, monkeypatch):
    emulated.configure(race=False)
    generator = micro_generator(load("rollout_mem_nk1")[0])
    model = generator.model.bfloat16().requires_grad_(False)
    exact = copy.deepcopy(model).double()
    generator = type(generator)(generator.config, CallByCall(model), generator.memory.bfloat16())
    draw = torch.Generator().manual_seed(1)
    texts = [model.encode_text(torch.randn(1, 5, 8, generator=draw).bfloat16()) for _ in range(2)]
    sampler = BlockSampler(generator, texts[0], counter_noise(5))
    with monkeypatch.context() as patch:  # the reference stream: PyTorch's ways throughout
        for module in ("attention", "gate", "memory", "norm", "ring", "rope"):
            patch.setattr(f"echo_ext.{module}.without_cuda_kernel", lambda *_: True, raising=False)
        patch.setattr("echo_ext._native._C", None)
        for block in range(7):
            if block == 6:
                sampler.switch(texts[1], memory_recache=True)
            sampler.next_block()
    calls = generator.model.calls[15:]  # the window fills; from block 4 on frames leave it and the memory is read
    launches = emulated.counters().launches
    for (x, level, text, cache, call, memory), plain, after in calls[:: len(calls) // 6]:
        wide = copy.deepcopy((x, level, text, cache, memory))
        with torch.inference_mode():
            actual = model(x, level, text, cache, call, memory, output=plain is not None)
            wide_x, wide_level, wide_text, wide_cache, wide_memory = to_float64(wide)
            oracle = exact(wide_x, wide_level, wide_text, wide_cache, call, wide_memory, output=plain is not None)
        if plain is not None:
            assert_no_worse_than(actual, plain, oracle)
        for name, written in cache.tensors().items():
            assert_no_worse_than(written, after[name], wide_cache.tensors()[name])
    assert emulated.counters().launches > launches + 100


def to_float64(value):
    """The same nest of tensors, caches and tuples in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        parts = [to_float64(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if hasattr(value, "tensors"):  # a cache
        value.k, value.v = to_float64(value.k), to_float64(value.v)
        value.raw = to_float64(value.raw)
    return value
