"""Replayed blocks: a graph captured at one block gives later blocks' results, whatever changed in between."""

import copy
from dataclasses import replace

import pytest
import torch
from echo_infinity.finite import FiniteWatch, NonFiniteError
from echo_infinity.graphs import BlockGraphs
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler
from micro import load, micro_generator
from numerics import assert_same_bits

import echo_ext.attention
import echo_ext.ring
import echo_ext.rope


class Again:
    """A capture for the CPU: replay runs the block's code once more, with the plan it was captured with."""

    def __init__(self):
        self.bodies = 0

    def record(self, body):
        self.bodies += 1
        out = torch.empty(1, 3, 4, 6, 8)
        return lambda: out.copy_(body()), out


@pytest.fixture
def fresh_tables(monkeypatch):
    """On the CPU expanded tables are kept by identity; a fixed table's numbers change, as they do on a GPU."""
    for module in (echo_ext.rope, echo_ext.ring, echo_ext.attention):
        for name in ("expand_tables", "expand_shift"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


def stream(name="rollout_mem_nk1", *, graphs=False, seed=3, **memory):
    generator = micro_generator(load(name)[0])
    if memory:
        generator.config = replace(generator.config, memory=replace(generator.config.memory, **memory))
        generator.memory.config = generator.config.memory
    words = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    sampler = BlockSampler(generator, generator.model.encode_text(words), counter_noise(seed), graphs=False)
    if graphs:
        sampler.graphs = BlockGraphs(sampler, Again())
    return sampler


def other_text(sampler):
    words = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
    return sampler.generator.model.encode_text(words)


@pytest.mark.parametrize("name", ["rollout_nomem", "rollout_mem_nk1", "rollout_mem_nk1_groups3"])
def test_replayed_blocks_are_the_blocks_run_call_by_call(name, fresh_tables):
    plain, replayed = stream(name), stream(name, graphs=True)
    for block in range(16):
        assert_same_bits(replayed.next_block(), plain.next_block(), f"block {block}")
    assert_same_bits(replayed.tensors(), plain.tensors())
    assert replayed.graphs.replays >= 5
    assert replayed.graphs._capture.bodies == 3  # ring of 9 frames, blocks of 3: the slots repeat every 3 blocks


@pytest.mark.parametrize("recache", [False, True])
def test_a_prompt_switch_reaches_the_replayed_blocks(recache, fresh_tables):
    plain, replayed = stream(), stream(graphs=True)
    for block in range(22):
        if block == 13:
            for sampler in (plain, replayed):
                sampler.switch(other_text(sampler), memory_recache=recache)
        assert_same_bits(replayed.next_block(), plain.next_block(), f"block {block}")
    assert replayed.graphs.replays >= 10


def test_a_loaded_state_reaches_the_replayed_blocks(fresh_tables):
    replayed, source = stream(graphs=True), stream(seed=8)
    for _ in range(14):
        replayed.next_block()
        source.next_block()
    replayed.load_tensors(copy.deepcopy(source.tensors()), source.frame)
    replayed.noise = source.noise
    before = replayed.graphs.replays
    for _ in range(4):
        assert_same_bits(replayed.next_block(), source.next_block())
    assert replayed.graphs.replays == before + 4


def test_states_of_replayed_streams_resume_call_by_call(fresh_tables):
    replayed, plain = stream(graphs=True), stream()
    for _ in range(14):
        replayed.next_block()
    plain.load_tensors(replayed.tensors(), replayed.frame)
    assert_same_bits(plain.next_block(), replayed.next_block())


@pytest.mark.parametrize(
    ("name", "memory", "reason"),
    [
        ("rollout_nomem_absrope", {}, "absolute ids"),
        ("rollout_mem_nk1", {"write_every": 2}, "write_every > 1"),
    ],
)
def test_what_can_not_be_replayed_says_why_and_runs_call_by_call(name, memory, reason, fresh_tables):
    plain, refused = stream(name, **memory), stream(name, graphs=True, **memory)
    for _ in range(12):
        assert_same_bits(refused.next_block(), plain.next_block())
    assert refused.graphs.replays == 0
    assert reason in refused.graphs.why_not(refused._call(refused.frame, 3))


def test_a_failed_capture_warns_and_the_stream_goes_on(fresh_tables):
    class Refuses:
        def record(self, body):
            raise RuntimeError("operation not permitted when stream is capturing")

    plain, broken = stream(), stream()
    broken.graphs = BlockGraphs(broken, Refuses())
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off for this stream, capture failed: operation not"):
        blocks = [broken.next_block() for _ in range(14)]
    assert_same_bits(blocks, [plain.next_block() for _ in range(14)])
    assert "capture failed" in broken.graphs.why_not(broken._call(broken.frame, 3))


def test_on_the_cpu_graphs_are_off_unless_asked_for():
    generator = micro_generator(load("rollout_mem_nk1")[0])
    text = generator.model.encode_text(torch.zeros(1, 5, 8))
    assert BlockSampler(generator, text, counter_noise(0)).graphs is None
    assert BlockSampler(generator, text, counter_noise(0), graphs=True).graphs is not None


def test_a_block_that_is_not_finite_is_noticed_at_once_on_the_cpu():
    watch = FiniteWatch()
    watch.note(torch.zeros(2), 0)
    with pytest.raises(NonFiniteError, match="block 7 holds NaN or Inf"):
        watch.note(torch.tensor([0.0, float("inf")]), 7)


@pytest.mark.gpu
def test_a_block_that_is_not_finite_is_noticed_without_waiting_on_a_gpu():
    watch = FiniteWatch()
    watch.note(torch.zeros(2, device="cuda"), 0)
    watch.note(torch.full((2,), float("nan"), device="cuda"), 1)
    with pytest.raises(NonFiniteError, match="block 1 holds NaN or Inf"):
        watch.check(wait=True)


def on_gpu(graphs):
    settings, _ = load("rollout_mem_nk1")
    generator = micro_generator(settings)
    model, memory = generator.model.cuda(), generator.memory.cuda()
    generator = type(generator)(generator.config, model, memory)
    words = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)).cuda()
    return BlockSampler(generator, model.encode_text(words), counter_noise(3), graphs=graphs)


@pytest.mark.gpu
def test_captured_graphs_see_fresh_inputs_on_replay():
    plain, replayed = on_gpu(False), on_gpu(True)
    for block in range(20):
        assert_same_bits(replayed.next_block().cpu(), plain.next_block().cpu(), f"block {block}")
    assert replayed.graphs.failure == ""
    assert replayed.graphs.replays >= 9


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_steady_block_makes_no_host_wait_for_the_device(graphs):
    sampler = on_gpu(graphs)
    for _ in range(14):
        sampler.next_block()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            sampler.next_block()
    finally:
        torch.cuda.set_sync_debug_mode("default")
