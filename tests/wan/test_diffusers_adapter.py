"""diffusers' WanTransformer3DModel attached: streams for ever as our own model does, and is given back as it was."""

import itertools

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from echo_infinity.adapters.diffusers import attach
from echo_infinity.finite import NoWatch
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler
from numerics import assert_library_equal, assert_same_bits
from wan import ours, transformer, with_exact_angles

SIZE = (8, 12)  # of the latents: 24 tokens a frame


def memory_of(model, seed=5):
    torch.manual_seed(seed)
    c = model.config
    width = c.num_attention_heads * c.attention_head_dim
    memory = EvolvingMemory(MemoryConfig(width=width, heads=c.num_attention_heads, frames=3, tokens_per_frame=24))
    torch.nn.init.normal_(memory.query_init)
    return memory


def prompt(seed=6, tokens=7):
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed))


def take(sampler, blocks):
    return [x.clone() for x in itertools.islice(sampler.blocks(), blocks)]


@torch.no_grad()
def answer(model):
    """What the model says on its own, to a fixed clip."""
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 3, *SIZE, generator=draw), torch.randn(1, 12, 16, generator=draw)
    return model(x, torch.tensor([500.0]), text).sample


@pytest.mark.parametrize("fused", [False, True])
def test_sixty_blocks_and_detached_as_before(fused):
    model = transformer()
    if fused:
        for block in model.blocks:
            block.attn1.fuse_projections()
    before, processors = answer(model), dict(model.attn_processors)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with attach(model, SIZE, memory=memory_of(model), text_tokens=12) as attached:
        sampler = attached.stream(prompt(), seed=3)
        latents = take(sampler, 60)
        assert sampler.frame == 180
        assert sampler.memory.writes == 56
        assert all(x.shape == (1, 3, 4, *SIZE) and torch.isfinite(x).all() for x in latents)
        held = {name: x.shape for name, x in sampler.tensors().items()}
        take(sampler, 2)
        assert {name: x.shape for name, x in sampler.tensors().items()} == held
    assert all(model.attn_processors[name] is p for name, p in processors.items())
    assert all(type(p) is WanAttnProcessor for p in model.attn_processors.values())
    assert_same_bits(dict(model.state_dict()), weights)
    assert_same_bits(answer(model), before)


@pytest.mark.parametrize("with_memory", [True, False])
@torch.no_grad()
def test_an_attached_model_streams_as_ours_with_its_weights(with_memory):
    model = with_exact_angles(transformer())
    memory = memory_of(model) if with_memory else None
    with attach(model, SIZE, memory=memory, text_tokens=12) as attached:
        mine = ours(model, attached.config)
        generator = Generator(attached.config, mine, memory)
        reference = BlockSampler(generator, mine.encode_text(prompt()), counter_noise(3))
        sampler = attached.stream(prompt(), seed=3)
        for expected, actual in zip(take(reference, 9), take(sampler, 9), strict=True):
            assert_library_equal(actual, expected)
        other = prompt(seed=8)
        reference.switch(mine.encode_text(other))
        sampler.switch(attached.text(other))
        for expected, actual in zip(take(reference, 3), take(sampler, 3), strict=True):
            assert_library_equal(actual, expected)


@torch.no_grad()
def test_a_model_loaded_in_bfloat16_streams_and_comes_back(tmp_path):
    transformer().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16, torch.float32}  # diffusers keeps norms wide
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with attach(model, SIZE, memory=memory_of(model).bfloat16(), text_tokens=12) as attached:
        sampler = attached.stream(prompt())
        assert all(torch.isfinite(x).all() for x in take(sampler, 7))
        assert {x.dtype for x in sampler.cache.tensors().values()} == {torch.bfloat16}
        assert sampler.memory.writes == 3
    assert_same_bits(dict(model.state_dict()), before)


@torch.no_grad()
def test_embeddings_may_be_on_another_device_than_the_model():
    model = transformer().to("meta")  # stands in for a GPU
    with attach(model, SIZE, memory=memory_of(model).to("meta"), text_tokens=12) as attached:
        sampler = attached.stream(prompt())
        sampler.finite = NoWatch()  # there are no numbers to look at
        assert {x.device.type for x in take(sampler, 7)} == {"meta"}


@torch.no_grad()
def test_memory_changes_what_is_shown_from_the_first_eviction_on():
    model = transformer()
    streams = []
    for memory in (None, memory_of(model)):
        with attach(model, SIZE, memory=memory, text_tokens=12) as attached:
            streams.append(take(attached.stream(prompt()), 6))
    assert_same_bits(streams[0][:4], streams[1][:4])
    assert not torch.equal(streams[0][4], streams[1][4])


@torch.no_grad()
def test_two_streams_on_one_model_do_not_meet():
    model = transformer()
    with attach(model, SIZE, memory=memory_of(model), text_tokens=12) as attached:
        alone = [take(attached.stream(prompt(seed), seed=seed), 6) for seed in (1, 2)]
        streams = [attached.stream(prompt(seed), seed=seed) for seed in (1, 2)]
        together = list(zip(*([s.next_block().clone() for s in streams] for _ in range(6)), strict=True))
        assert_same_bits([list(x) for x in together], alone)


def test_while_attached_it_serves_streams_alone():
    model = transformer()
    with attach(model, SIZE, text_tokens=12):
        with pytest.raises(RuntimeError, match="detach it before calling it on its own"):
            answer(model)
        with pytest.raises(ValueError, match="attached already"):
            attach(model, SIZE)
    answer(model)


def test_a_detached_model_starts_no_stream():
    attached = attach(transformer(), SIZE, text_tokens=12)
    attached.detach()
    attached.detach()
    with pytest.raises(ValueError, match="detached: attach it again"):
        attached.stream(prompt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_dim": 8, "added_kv_proj_dim": 24}, "only text-to-video models stream: this one has image_dim 8"),
        ({"in_channels": 8}, "in_channels 8, out_channels 4"),
    ],
)
def test_other_kinds_of_model_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attach(transformer(**options), SIZE)


def test_a_memory_of_another_width_is_refused_and_changes_nothing():
    model = transformer()
    before = dict(model.attn_processors)
    memory = EvolvingMemory(MemoryConfig(width=48, heads=4, frames=3, tokens_per_frame=24))
    with pytest.raises(ValueError, match="memory is 48 wide with 4 heads, the model 24 with 2"):
        attach(model, SIZE, memory=memory)
    assert model.attn_processors == before


@pytest.mark.parametrize("shape", [(1, 13, 16), (1, 5, 8), (5, 16)])
def test_embeddings_of_another_shape_are_refused(shape):
    with (
        attach(transformer(), SIZE, text_tokens=12) as attached,
        pytest.raises(ValueError, match=r"embeddings must be \(B, <= 12, 16\)"),
    ):
        attached.stream(torch.zeros(shape))
