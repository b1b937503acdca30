"""The stream of blocks: against itself spelt out, order of calls, switches, batches, limits, and nothing that grows."""

import gc
from dataclasses import replace

import pytest
import torch
from echo_infinity.config import EchoConfig, ModelConfig, SamplerConfig, WindowConfig
from echo_infinity.finite import NonFiniteError
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler
from micro import load
from numerics import assert_golden, assert_no_worse_than, assert_same_bits
from plain import PlainSampler

SMALL = ModelConfig(width=24, heads=2, layers=2, ffn=32, latent_channels=2, text_tokens=3, text_width=4, time_width=8)
WINDOWS = {
    "official": WindowConfig(),
    "no sink": WindowConfig(sink_frames=0, window_frames=9),
    "sink larger than a block": WindowConfig(sink_frames=5, window_frames=12),
    "window of one block": WindowConfig(sink_frames=3, window_frames=6),
    "sink and ring no multiples of a block": WindowConfig(sink_frames=1, window_frames=9, p_max=13),
}


def make_generator(window=WINDOWS["official"], *, memory=True, sampler=None, dtype=torch.float32, **options):
    """A small generator with random weights, whose memory matters from its first write."""
    settings = MemoryConfig(width=24, heads=2, frames=options.pop("frames", 2), tokens_per_frame=4, **options)
    config = EchoConfig(
        model=SMALL,
        latent_rows=4,
        latent_columns=4,
        window=window,
        memory=settings if memory else None,
        sampler=sampler or SamplerConfig(steps=(1000, 500)),
    )
    module = EvolvingMemory(settings).to(dtype) if memory else None
    if memory:
        torch.nn.init.normal_(module.query_init)
        torch.nn.init.zeros_(module.gate_linear.bias)
    return Generator(config, CausalDiT(SMALL).to(dtype), module)


@torch.no_grad()
def prompt(generator, batch=1):
    words = torch.randn(batch, 3, 4, dtype=torch.float64).to(generator.dtype)
    return generator.model.encode_text(words)


def wide_noise(seed):
    """Float64 noise, so that the whole stream runs in float64."""
    noise = counter_noise(seed)
    return lambda *key: noise(*key).double()


class Spy(torch.nn.Module):
    """Passes calls on to the model and keeps what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head, self.calls = model, model.head, []

    def condition(self, t):
        self.calls.append({"t": t.flatten().tolist()})
        return self.model.condition(t)

    def forward(self, x, level, text, cache, call, memory=None, *, output=True):
        seen = None if memory is None else memory[0][0].clone()
        self.calls.append({"x": x.clone(), "start": call.start, "level": level, "memory": seen, "output": output})
        return self.model(x, level, text, cache, call, memory, output=output)


@pytest.fixture
def exact_tables(monkeypatch):
    """Leave the rotation tables in float64, so that the whole engine can be compared in float64."""
    monkeypatch.setattr("echo_ext.rope._cos_sin", lambda angles: torch.stack([angles.cos(), angles.sin()], dim=-1))


@pytest.mark.parametrize("solver", ["renoise", "euler"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_blocks_and_memory_equal_the_stream_spelt_out(window, solver, exact_tables):
    generator = make_generator(window, dtype=torch.float64, sampler=SamplerConfig(steps=(1000, 500), solver=solver))
    text, noise = prompt(generator, 2), wide_noise(5)
    ours, plain = BlockSampler(generator, text, noise, 2), PlainSampler(generator, text, noise, 2)
    for _ in range(9):
        expected = plain.next_block()
        assert_no_worse_than(ours.next_block(), expected, expected)
        assert ours.memory.active == (plain.state is not None)
        if plain.state is not None:
            assert_no_worse_than(ours.memory.state[0], plain.state, plain.state)
    assert ours.memory.writes >= 4


@pytest.mark.parametrize("memory_recache", [False, True], ids=["memory kept", "memory re-cached"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 8], ids=lambda b: f"frame {3 * b}")
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_a_switch_at_any_frame_equals_the_stream_spelt_out(window, at, memory_recache, exact_tables):
    """Before the window is full too, where re-caching the memory leaves it inactive until frames first leave."""
    generator = make_generator(window, dtype=torch.float64)
    first, second, noise = prompt(generator), prompt(generator), wide_noise(5)
    ours, plain = BlockSampler(generator, first, noise), PlainSampler(generator, first, noise)
    ours.window = ours.window.double()
    for block in range(at + 3):
        if block == at:
            for stream in (ours, plain):
                stream.switch(second, memory_recache=memory_recache)
            assert ours.memory.active == (plain.state is not None) == (3 * at > window.window_frames)
        expected = plain.next_block()
        assert_no_worse_than(ours.next_block(), expected, expected)
        if plain.state is not None:
            assert_no_worse_than(ours.memory.state[0], plain.state, plain.state)


def test_a_switch_before_the_first_block_only_changes_the_prompt():
    generator = make_generator()
    first, second = prompt(generator), prompt(generator)
    switched, fresh = (
        BlockSampler(generator, first, counter_noise(1)),
        BlockSampler(generator, second, counter_noise(1)),
    )
    assert switched.switch(second, memory_recache=True) is None
    for _ in range(2):
        assert_same_bits(switched.next_block(), fresh.next_block())


def test_a_switch_to_the_same_prompt_leaves_the_first_layer_as_it_was():
    """Its keys and values depend on the latents alone; those of deeper layers see the whole window at once."""
    generator = make_generator()
    text = prompt(generator)
    sampler = BlockSampler(generator, text, counter_noise(1))
    for _ in range(7):
        sampler.next_block()
    before = sampler.cache.k[0].clone(), sampler.cache.v[0].clone()
    sampler.switch(text)
    for x, y in zip((sampler.cache.k[0], sampler.cache.v[0]), before, strict=True):
        assert_no_worse_than(x, y, y)


def test_a_switch_without_a_protected_sink_recomputes_it():
    generator = make_generator()
    for blocks in (2, 7):
        kept, remade = (BlockSampler(generator, prompt(generator), counter_noise(1)) for _ in range(2))
        for sampler, global_sink in ((kept, True), (remade, False)):
            for _ in range(blocks):
                sampler.next_block()
            before = sampler.cache.sink()[1].clone()
            sampler.switch(prompt(generator), global_sink=global_sink)
            assert torch.equal(sampler.cache.sink()[1], before) == global_sink


def test_a_block_is_denoised_written_to_memory_and_cached_in_this_order():
    """Five calls: the first reads the old memory, the others and the context pass the new one."""
    generator = make_generator(sampler=SamplerConfig())
    spy = Spy(generator.model)
    generator.model = spy
    sampler = BlockSampler(generator, spy.model.encode_text(torch.randn(1, 3, 4)), counter_noise(1))
    for _ in range(6):
        sampler.next_block()
    levels = [c["t"][0] for c in spy.calls if "t" in c]
    assert levels == [*generator.timesteps, 0.0]  # each computed once in the whole stream
    calls = [c for c in spy.calls if "x" in c]
    assert [c["start"] for c in calls] == [3 * b for b in range(6) for _ in range(5)]
    assert [c["output"] for c in calls] == [True, True, True, True, False] * 6
    expected = [generator.level(t) for t in levels]
    assert all(c["level"] is expected[i % 5] for i, c in enumerate(calls))
    memory = [c["memory"] for c in calls]
    assert all(m is None for m in memory[:21])  # window full at block 4, whose first call pushes frames out
    assert all(m is not None for m in memory[21:])
    for first in (20, 25):
        for later in range(first + 2, first + 5):
            assert_same_bits(memory[later], memory[first + 1])
    assert not torch.equal(memory[26], memory[25])


@pytest.mark.parametrize("solver", ["renoise", "euler"])
def test_a_model_that_knows_the_answer_is_taken_at_its_word(solver):
    """With the true flow towards one clean block, both solvers land on it, whatever the steps."""
    generator = make_generator(memory=False, sampler=SamplerConfig(steps=(1000, 700, 300), solver=solver))
    answer = torch.randn(1, 3, 2, 4, 4)
    levels = dict(zip(generator.timesteps, (generator.schedule.sigma(t) for t in generator.timesteps), strict=True))

    class Oracle(Spy):
        def forward(self, x, level, text, cache, call, memory=None, *, output=True):
            sigma = next((s for t, s in levels.items() if generator.level(t) is level), None)
            return None if not output else (x - answer) / sigma

    generator.model = Oracle(generator.model)
    out = BlockSampler(generator, [], counter_noise(1)).next_block()
    assert_no_worse_than(out, answer, answer)


def test_an_euler_step_matches_golden_data():
    """The file steps from each warped level to the next entry of the table."""
    _, tensors = load("scheduler")
    generator = make_generator(memory=False, sampler=SamplerConfig(solver="euler"))
    sampler = BlockSampler(generator, [], counter_noise(1))
    for i, index in enumerate((0, 250, 500, 750)):
        generator.timesteps = generator.schedule.timesteps[[index, index + 1]].tolist()
        out = sampler._step(tensors["shift5.noise"][i], tensors["shift5.flow"][i], 0, sampler.draw)
        assert_golden(out, tensors["shift5.step"][i])


def test_noise_levels_follow_the_weights():
    generator = make_generator(memory=False)
    before = generator.level(500.0)
    assert generator.level(500.0) is before
    with torch.no_grad():
        generator.model.head.modulation.add_(1.0)
        generator.model.head.head.weight.mul_(2.0)
    after = generator.level(500.0)
    assert_no_worse_than(after.head[0], before.head[0] + 1, before.head[0].double() + 1)


def test_a_batch_of_streams_equals_single_streams():
    generator = make_generator(dtype=torch.float64)
    texts, noises = [prompt(generator) for _ in range(2)], [wide_noise(seed) for seed in (1, 2)]
    joined = [tuple(torch.cat(kv) for kv in zip(*layers, strict=True)) for layers in zip(*texts, strict=True)]
    shape = (1, 3, 2, 4, 4)
    batch = BlockSampler(generator, joined, lambda b, i, _: torch.cat([n(b, i, shape) for n in noises]), 2)
    singles = [BlockSampler(generator, *pair) for pair in zip(texts, noises, strict=True)]
    for block in range(8):
        if block == 6:
            batch.switch(joined, memory_recache=True)
            for single in singles:
                single.switch(single.text, memory_recache=True)
        expected = torch.cat([single.next_block() for single in singles])
        assert_no_worse_than(batch.next_block(), expected, expected)


def test_streams_of_one_generator_do_not_touch_each_other():
    generator = make_generator()
    text = prompt(generator)
    alone = BlockSampler(generator, text, counter_noise(1))
    expected = [alone.next_block() for _ in range(6)]
    mixed = [BlockSampler(generator, text, counter_noise(seed)) for seed in (1, 2)]
    for block in expected:
        out, other = (sampler.next_block() for sampler in mixed)
        assert_same_bits(out, block)
        assert not torch.equal(other, block)


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "no memory"])
def test_observing_a_generated_stream_leaves_the_same_state(memory):
    generator = make_generator(memory=memory)
    text = prompt(generator)
    source, copy = (BlockSampler(generator, text, counter_noise(1)) for _ in range(2))
    for _ in range(7):
        copy.observe(source.next_block())
        assert_same_bits(copy.tensors(), source.tensors())
    assert_same_bits(copy.next_block(), source.next_block())


def test_observing_another_shape_is_an_error():
    sampler = BlockSampler(generator := make_generator(), prompt(generator), counter_noise(1))
    with pytest.raises(ValueError, match=r"a block of this stream is \(1, 3, 2, 4, 4\), got \(1, 3, 2, 4, 5\)"):
        sampler.observe(torch.zeros(1, 3, 2, 4, 5))
    assert sampler.frame == 0


def test_memory_off_leaves_no_trace_of_it():
    config_without, module_left_out = make_generator(memory=False), make_generator()
    module_left_out.memory = None
    for generator in (config_without, module_left_out):
        sampler = BlockSampler(generator, prompt(generator), counter_noise(1))
        for _ in range(6):
            sampler.next_block()
        assert sampler.memory is None
        assert not [name for name in sampler.tensors() if name.startswith("memory")]
        assert sampler.switch(prompt(generator), memory_recache=True) is not None
    assert "cache.raw" not in BlockSampler(config_without, [], counter_noise(1)).tensors()


def test_a_memory_that_the_configuration_does_not_describe_is_refused():
    generator = make_generator()
    other = EvolvingMemory(replace(generator.config.memory, groups=2))
    for config in (generator.config, replace(generator.config, memory=None)):
        with pytest.raises(ValueError, match=r"memory is MemoryConfig\(.*groups=2.*the configuration says"):
            Generator(config, generator.model, other)
    Generator(generator.config, generator.model, EvolvingMemory(replace(generator.config.memory, frozen=True)))


def test_nothing_grows_over_40_blocks():
    generator = make_generator(WINDOWS["sink and ring no multiples of a block"])
    sampler = BlockSampler(generator, prompt(generator), counter_noise(1))

    def living():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    counts, places = [], []
    for block in range(40):
        sampler.next_block()
        if block in (12, 25, 39):
            tensors = sampler.tensors()
            places.append({n: (x.shape, x.data_ptr()) for n, x in tensors.items() if not n.startswith("memory")})
            counts.append((living(), len(generator._levels), tensors["memory.state"].shape))
            del tensors
    assert len(set(counts)) == 1
    assert all(place == places[0] for place in places)


def test_absolute_ids_end_the_stream_with_a_clear_error():
    generator = make_generator(WindowConfig(relative=False))
    sampler = BlockSampler(generator, prompt(generator), counter_noise(1))
    sampler.frame = 1020
    sampler.next_block()
    before = {name: x.clone() for name, x in sampler.tensors().items()}
    with pytest.raises(ValueError, match="absolute ids reach frame 1026, their table ends at 1024"):
        sampler.next_block()
    assert sampler.frame == 1023
    assert_same_bits(sampler.tensors(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_block_that_is_not_finite_is_never_emitted(bad):
    generator = make_generator()
    noise = counter_noise(1)
    sampler = BlockSampler(generator, prompt(generator), lambda b, i, s: noise(b, i, s) * (bad if b == 2 else 1))
    blocks = sampler.blocks()
    kept = [next(blocks) for _ in range(2)]
    window = sampler.window.clone()
    with pytest.raises(
        NonFiniteError, match="block 2 holds NaN or Inf after denoising; resume from the last saved state"
    ):
        next(blocks)
    assert sampler.frame == 6
    assert_same_bits(sampler.window, window)
    assert all(x.isfinite().all() for x in kept)


def test_emitted_blocks_are_float32_of_any_model():
    generator = make_generator(dtype=torch.bfloat16)
    sampler = BlockSampler(generator, prompt(generator), counter_noise(1), memory_dtype=torch.float32)
    for _ in range(6):
        out = sampler.next_block()
    assert (out.dtype, out.shape) == (torch.float32, (1, 3, 2, 4, 4))
    assert (sampler.cache.k[0].dtype, sampler.memory.state.dtype) == (torch.bfloat16, torch.float32)


def test_streaming_keeps_no_gradients():
    generator = make_generator()
    sampler = BlockSampler(generator, prompt(generator), counter_noise(1))
    assert all(not sampler.next_block().requires_grad for _ in range(6))
    assert not any(x.requires_grad for x in sampler.tensors().values())
