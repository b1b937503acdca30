"""The DiT: official names and shapes, sinusoid, text padding, modulation, and passes that only fill the cache."""

import json
import re
from dataclasses import replace

import pytest
import torch
from echo_infinity.cache import Geometry, RingKV
from echo_infinity.config import preset
from echo_infinity.functional import FunctionalKV
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT, Head, sinusoid
from micro import GOLDEN, load, micro_config, micro_generator
from numerics import assert_no_worse_than, assert_same_bits
from torch.nn import functional as nnf


@pytest.fixture(scope="module")
def layout():
    return json.loads((GOLDEN / "state_dict_layout.json").read_text())


@pytest.fixture
def micro():
    settings, tensors = load("rollout_nomem")
    generator = micro_generator(settings)
    return generator.model, generator.config, tensors


def shapes(module):
    return {name: list(x.shape) for name, x in module.state_dict().items()}


def test_official_preset_has_exactly_the_official_tensors(layout):
    config = preset("wan2.1-1.3b")
    with torch.device("meta"):
        model = CausalDiT(config.model)
    prefix = layout["generator_prefix"]
    assert {f"{prefix}{name}": shape for name, shape in shapes(model).items()} == layout["generator"]
    assert sum(x.numel() for x in model.parameters()) == layout["generator_params"] == 1_418_996_800
    assert len(model.state_dict()) == 825


@pytest.mark.parametrize("normalise_keys", [False, True])
def test_official_memory_has_exactly_the_official_tensors(layout, normalise_keys):
    config = replace(preset("wan2.1-1.3b").memory, normalise_keys=normalise_keys)
    with torch.device("meta"):
        memory = EvolvingMemory(config)
    expected = dict(layout["memory_encoder"])
    if not normalise_keys:
        del expected["norm_k_out.weight"]
    assert shapes(memory) == expected


def test_sinusoid_matches_golden_data():
    tensors = load("scheduler")[1]
    t = torch.tensor([0.0, 625.0, 2500 / 3, 937.5, 1000.0])  # float32, as the schedule's table
    for width in (32, 256):
        expected = tensors[f"sin{width}"]
        assert expected.dtype == sinusoid(t, width).dtype == torch.float64
        assert_no_worse_than(sinusoid(t, width), expected, expected)


@torch.no_grad()
def test_a_pass_without_output_writes_what_a_full_pass_writes(micro):
    model, config, tensors = micro
    geometry, text = Geometry(config), model.encode_text(tensors["text"][:1])
    caches = [RingKV(config), RingKV(config)]
    for block in range(2):
        x, call, level = torch.randn(1, 3, 4, 6, 8), geometry.call(3 * block, 3), model.condition(torch.zeros(1, 1))
        flow = model(x, level, text, caches[0], call)
        assert flow.shape == x.shape
        assert model(x, level, text, caches[1], call, output=False) is None
        assert_same_bits(caches[1].tensors(), caches[0].tensors())


@torch.no_grad()
def test_short_prompts_are_padded_with_zeros_that_are_attended_to(micro):
    model, *_ = micro
    words = torch.randn(2, 3, 8)
    padded = nnf.pad(words, (0, 0, 0, 2))
    assert_same_bits(model.encode_text(words), model.encode_text(padded))
    for k, v in model.encode_text(words):
        assert k.shape == v.shape == (2, 5, 3, 16)
        assert v[:, 3:].abs().max() > 0  # the embedding's biases: what training saw


@pytest.mark.parametrize(("words", "padding"), [(5, 0), (3, 2), (1, 4), (0, 5)])
@torch.no_grad()
def test_padding_of_a_prompt_is_counted_whoever_padded_it(micro, words, padding):
    short = torch.randn(2, words, 8)
    short[0, 1:] = 0  # the longer prompt decides
    for given in (short, nnf.pad(short, (0, 0, 0, 5 - words))):
        assert [text.padding for text in micro[0].encode_text(given)] == [padding] * 3


@torch.no_grad()
def test_one_token_of_padding_stands_for_all(micro):
    model, config, _ = micro
    x, level, call = torch.randn(1, 3, 4, 6, 8), model.condition(torch.zeros(1, 1)), Geometry(config).call(0, 3)
    text = model.encode_text(torch.randn(1, 2, 8))
    out, whole = (model(x, level, t, RingKV(config), call) for t in (text, [tuple(pair) for pair in text]))
    assert_no_worse_than(out, whole, whole)


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 5, 7), (5, 8)])
def test_text_of_another_shape_is_an_error(micro, shape):
    with pytest.raises(ValueError, match=re.escape(f"text embeddings must be (B, <= 5, 8), got {shape}")):
        micro[0].encode_text(torch.zeros(shape))


@torch.no_grad()
def test_patches_are_the_convolution_of_the_checkpoint(micro):
    model, *_ = micro
    x = torch.randn(2, 3, 4, 6, 8)
    expected = model.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)
    exact = model.double().patch_embedding(x.double().transpose(1, 2)).flatten(2).transpose(1, 2)
    assert_no_worse_than(model.float().patchify(x), expected, exact)


@torch.no_grad()
def test_unpatchify_undoes_patchify(micro):
    model, *_ = micro
    x = torch.randn(2, 3, 4, 6, 8)
    weight = torch.eye(16).view(16, 4, 1, 2, 2)
    model.patch_embedding.weight = torch.nn.Parameter(weight)
    model.patch_embedding.bias = None
    patches = model.patchify(x)  # channels first within a patch; the head gives them last
    assert_same_bits(model.unpatchify(patches.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2), x.shape), x)


@torch.no_grad()
def test_every_frame_can_have_its_own_timestep(micro):
    model, *_ = micro
    mixed = model.condition(torch.tensor([[1000.0, 500.0, 0.0]]))
    for i, t in enumerate((1000.0, 500.0, 0.0)):
        alone = model.condition(torch.full((1, 1), t))
        for a, b in zip((*mixed.layers, mixed.head), (*alone.layers, alone.head), strict=True):
            for x, y in zip(a, b, strict=True):
                assert_no_worse_than(x[:, i : i + 1], y, y)


@torch.no_grad()
def test_every_norm_uses_the_configured_eps():
    settings, _ = load("rollout_nomem")
    config = micro_config(settings)
    text, x = torch.randn(1, 5, 8), 1e-3 * torch.randn(1, 3, 4, 6, 8)
    flows = []
    for eps in (1e-6, 1e-2):
        own = replace(config, model=replace(config.model, eps=eps))
        torch.manual_seed(1)
        model = CausalDiT(own.model)
        assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {eps}
        call = Geometry(own).call(0, 3)
        flows.append(model(x, model.condition(torch.zeros(1, 1)), model.encode_text(text), RingKV(own), call))
    assert not torch.allclose(*flows)
    head = Head(8, 4, 1e-2)
    torch.nn.init.eye_(head.head.weight)
    torch.nn.init.zeros_(head.head.bias)
    h = 0.1 * torch.randn(1, 3, 8)
    expected = nnf.layer_norm(h, (8,), eps=1e-2)[..., :4]
    assert_no_worse_than(head(h, (torch.zeros(1, 3, 1, 8), torch.ones(1, 3, 1, 8))), expected, expected)


@torch.no_grad()
def test_batch_rows_do_not_see_each_other(micro):
    model, config, _ = micro
    geometry, words = Geometry(config), torch.randn(2, 5, 8)
    x, level = torch.randn(2, 3, 4, 6, 8), model.condition(torch.zeros(1, 1))
    both = model(x, level, model.encode_text(words), RingKV(config, 2), geometry.call(0, 3))
    for b in range(2):
        row = slice(b, b + 1)
        alone = model(x[row], level, model.encode_text(words[row]), RingKV(config), geometry.call(0, 3))
        assert_no_worse_than(both[row], alone, alone)


@torch.no_grad()
def test_one_prompt_serves_a_batch(micro):
    model, config, _ = micro
    geometry, words = Geometry(config), torch.randn(1, 5, 8)
    x, level = torch.randn(2, 3, 4, 6, 8), model.condition(torch.zeros(1, 1))
    shared, own = (model.encode_text(w) for w in (words, words.expand(2, -1, -1)))
    out, expected = (model(x, level, text, RingKV(config, 2), geometry.call(0, 3)) for text in (shared, own))
    assert_no_worse_than(out, expected, expected)


@torch.no_grad()
def test_bfloat16_errs_no_more_with_the_ring_than_with_plain_attention(micro):
    model, config, tensors = micro
    x, call = torch.randn(1, 3, 4, 6, 8).bfloat16(), Geometry(config).call(0, 3)

    def flow(dtype, cache):
        own = model.bfloat16().to(dtype)
        return own(x.to(dtype), own.condition(torch.zeros(1, 1)), own.encode_text(tensors["text"][:1]), cache, call)

    exact = flow(torch.float64, FunctionalKV(config))
    ring = flow(torch.bfloat16, RingKV(config, dtype=torch.bfloat16))
    assert_no_worse_than(ring, flow(torch.bfloat16, FunctionalKV(config)), exact)
