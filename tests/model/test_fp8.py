"""Eight-bit weights and cache: what rounding allows, the same stream from it, and states that fit."""

import itertools
from dataclasses import replace

import pytest
import torch
from echo_infinity.cache import Geometry, RingKV
from echo_infinity.config import WindowConfig
from echo_infinity.fp8 import MODES, Fp8Linear, Fp8RingKV, narrow, narrow_weights, widen
from echo_infinity.generator import Generator
from echo_infinity.noise import counter_noise
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.policies import make_generator
from echo_infinity.sampler import BlockSampler
from echo_infinity.state import ResumeWarning
from echo_infinity.weights import Checkpoint, load_checkpoint
from micro import golden_noise, load, micro_generator
from numerics import assert_fp8_close, assert_same_bits
from small import CIRCLE, save_small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_narrowing_errs_by_a_rounding_of_e4m3(dtype, size):
    x = (torch.randn(3, 5, 64) * size).to(dtype)
    codes, scale = narrow(x)
    assert (codes.dtype, scale.shape) == (torch.uint8, (3, 5, 1))
    back = widen(codes, scale, dtype)
    # Four bits of mantissa: half of 2**-3 of a value, and below the normal numbers a step of the smallest.
    allowed = x.abs().float() / 16 + scale * 2**-9
    assert ((back.float() - x.float()).abs() <= allowed * 1.01).all()
    assert_same_bits(narrow(back.float())[0], codes)


def test_zeros_stay_zeros():
    codes, scale = narrow(torch.zeros(2, 8))
    assert widen(codes, scale, torch.float32).eq(0).all()


@torch.no_grad()
def test_a_linear_layer_is_that_of_its_rounded_weight():
    linear, x = torch.nn.Linear(16, 24), torch.randn(5, 16)
    codes, scale = narrow(linear.weight)
    expected = torch.nn.functional.linear(x, widen(codes, scale, torch.float32), linear.bias)
    assert_same_bits(Fp8Linear(linear)(x), expected)


def test_the_linear_layers_of_the_blocks_take_half_of_bfloat16():
    generator = micro_generator(load("rollout_mem_nk1")[0])
    linears = [m for block in generator.model.layers() for m in block.modules() if isinstance(m, torch.nn.Linear)]
    before = sum(m.weight.numel() * 2 for m in linears)
    narrowed = [m for m in narrow_weights(generator.model).modules() if isinstance(m, Fp8Linear)]
    assert len(narrowed) == len(linears) == 30
    assert sum(m.codes.nbytes for m in narrowed) * 2 == before


def test_the_ring_holds_its_layers_but_the_last_in_eight_bits():
    config = micro_generator(load("rollout_mem_nk1")[0]).config
    full, narrowed = RingKV(config).tensors(), Fp8RingKV(config).tensors()
    assert {n for n, x in narrowed.items() if x.dtype == torch.float32 and not n.endswith("scale")} == {
        "k.2",
        "v.2",
        "raw",
    }
    assert narrowed["k.0.codes"].shape == full["k.0"].shape
    assert narrowed["k.0.codes"].nbytes * 4 == full["k.0"].nbytes


def test_frames_are_stored_as_one_by_one_where_a_block_wraps_in_the_ring():
    config = micro_generator(load("rollout_nomem")[0]).config
    config = replace(config, window=WindowConfig(sink_frames=1, window_frames=9))  # 8 ring slots, blocks of 3
    ring, geometry, t, wraps = Fp8RingKV(config), Geometry(config), config.tokens_per_frame, 0
    for start in range(0, 30, 3):
        call = geometry.call(start, 3)
        wraps += call.slots.write[-1] < call.slots.write[0]
        expected = {name: x.clone() for name, x in ring.tensors().items()}
        ring.attend(0, *torch.randn(3, 1, 3 * t, 3, 16), (None, None), call, None)
        for kind, full in (("k", ring.k[0]), ("v", ring.v[0])):  # as the layer was attended to
            for slot in call.slots.write:
                own = slice(slot * t, (slot + 1) * t)
                codes, scales = narrow(full[:, own])
                expected[f"{kind}.0.codes"][:, own], expected[f"{kind}.0.scale"][:, own] = codes, scales
        assert_same_bits(ring.tensors(), expected)
    assert wraps >= 2


@pytest.mark.parametrize("policy", ["evolving", "ema"])
@torch.no_grad()
def test_a_memory_re_cached_in_eight_bits_is_near_the_one_in_full(policy):
    generator, streams = micro_generator(load("rollout_mem_nk1")[0]), []
    checkpoint = Checkpoint(generator.config, generator.model, generator.memory, None, None, "")
    first, then = (generator.model.encode_text(words) for words in torch.randn(2, 1, 5, 8))
    for kv in MODES:
        stream = BlockSampler(make_generator(checkpoint, policy, kv=kv), first, counter_noise(3))
        for _ in range(8):
            stream.next_block()
        stream.switch(then, memory_recache=True)
        streams.append(stream)
    full, narrowed = (stream.memory.tensors() for stream in streams)
    for name in [name for name, x in full.items() if x.is_floating_point()]:
        for ours, theirs in zip(narrowed[name], full[name], strict=True):  # each layer's, or group's
            assert_fp8_close(ours, theirs, "weights")  # one value a number, not a rollout's mean
    assert_fp8_close(streams[1].next_block(), streams[0].next_block(), "cache")


@pytest.mark.parametrize(("weights", "kv"), [("fp8", "full"), ("full", "fp8"), ("fp8", "fp8")])
@pytest.mark.parametrize(
    "name", ["rollout_nomem", "rollout_mem_nk0", "rollout_mem_nk1_groups3", "rollout_mem_sinkanchor_resid"]
)
@torch.no_grad()
def test_golden_rollouts_in_eight_bits_stay_near(name, weights, kv):
    settings, tensors = load(name)
    generator = micro_generator(settings)
    text = generator.model.encode_text(tensors["text"][:1])
    if weights == "fp8":
        narrow_weights(generator.model)
    generator = Generator(generator.config, generator.model, generator.memory, kv=kv)
    sampler = BlockSampler(generator, text, golden_noise(tensors))
    latents = torch.cat([sampler.next_block() for _ in range(15)], 1)
    assert not torch.equal(latents, tensors["latents"])
    assert_fp8_close(latents, tensors["latents"], "weights" if weights == "fp8" else "cache")


@pytest.mark.parametrize("options", [{"weights": "fp8"}, {"kv": "fp8"}, {"weights": "fp8", "kv": "fp8"}])
def test_streams_save_resume_fork_and_switch_in_eight_bits(tmp_path, options):
    pipe = EchoPipeline.from_pretrained(save_small(tmp_path / "model"), **options)
    stream = pipe.stream(CIRCLE)
    list(itertools.islice(stream, 6))
    stream.save(tmp_path / "s.safetensors")
    twin = stream.fork()
    expected = list(itertools.islice(stream, 3))
    assert_same_bits(list(itertools.islice(twin, 3)), expected)
    assert_same_bits(list(itertools.islice(pipe.resume(tmp_path / "s.safetensors"), 3)), expected)
    stream.switch("a blue square drifts over a dark field")
    next(stream)


@pytest.mark.parametrize("options", [{"weights": "fp8"}, {"kv": "fp8"}])
def test_a_state_in_eight_bits_resumes_in_full_and_says_so(tmp_path, options):
    folder = save_small(tmp_path / "model")
    stream = EchoPipeline.from_pretrained(folder, **options).stream(CIRCLE)
    list(itertools.islice(stream, 6))
    stream.save(tmp_path / "s.safetensors")
    with pytest.warns(ResumeWarning, match="dtype was float32, fp8 (weights|kv), is float32"):
        resumed = EchoPipeline.from_pretrained(folder).resume(tmp_path / "s.safetensors")
    assert next(resumed).shape == (12, 32, 32, 3)


@pytest.mark.parametrize("options", [{"weights": "int4"}, {"kv": "fp16"}])
def test_other_modes_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must be one of full, fp8"):
        EchoPipeline.from_pretrained(save_small(tmp_path / "model"), **options)


def test_a_checkpoint_that_another_pipeline_narrowed_is_not_run_as_if_in_full(tmp_path):
    checkpoint = load_checkpoint(save_small(tmp_path / "model"))
    expected = next(EchoPipeline(checkpoint, weights="fp8").stream(CIRCLE))
    with pytest.raises(ValueError, match="another pipeline narrowed this checkpoint's weights to fp8: load it again"):
        EchoPipeline(checkpoint)
    assert_same_bits(next(EchoPipeline(checkpoint, weights="fp8").stream(CIRCLE)), expected)


def test_the_cache_of_a_batch_keeps_rows_apart():
    generator = micro_generator(load("rollout_nomem")[0])
    generator = Generator(generator.config, generator.model, None, kv="fp8")
    text, both = generator.model.encode_text(torch.randn(2, 5, 8)), counter_noise(3)

    def second_row(block, step, shape):
        return both(block, step, (2, *shape[1:]))[1:]

    two = BlockSampler(generator, text, both, batch=2)
    one = BlockSampler(generator, [(k[1:], v[1:]) for k, v in text], second_row)
    for _ in range(6):
        assert_fp8_close(two.next_block()[1:], one.next_block(), "cache")
