"""Our DiT against diffusers' WanTransformer3DModel, and our LoRA merge against peft's."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from echo_infinity.bidirectional import bidirectional_flow
from echo_infinity.checkpoints.convert import Settings, Sources, convert
from echo_infinity.weights import load_checkpoint
from numerics import assert_library_equal
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from wan import config_of, ours, transformer, with_exact_angles


def inputs(config, frames, tokens, batch=2, most=10):
    m = config.model
    x = torch.randn(batch, frames, m.latent_channels, config.latent_rows, config.latent_columns)
    return x, torch.rand(batch) * most, torch.randn(batch, tokens, m.text_width)


@pytest.mark.parametrize("sizes", [{}, {"attention_head_dim": 16, "num_attention_heads": 3, "num_layers": 4}])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("most", [10, 1000])
@torch.no_grad()
def test_flow_equals_diffusers_with_one_timestep_a_clip(sizes, frames, most):
    theirs = transformer(**sizes) if most == 10 else with_exact_angles(transformer(**sizes))
    config = config_of(theirs)
    mine, (x, t, text) = ours(theirs, config), inputs(config, frames, config.model.text_tokens, most=most)
    expected = theirs(x.transpose(1, 2), t, text).sample.transpose(1, 2)
    actual = bidirectional_flow(mine, config, x, t[:, None].expand(-1, frames), mine.encode_text(text))
    assert expected.std() > 0.1
    assert_library_equal(actual, expected)


@torch.no_grad()
def test_flow_equals_diffusers_with_a_timestep_a_frame():
    theirs, frames = with_exact_angles(transformer()), 3
    config = config_of(theirs)
    mine, (x, _, text) = ours(theirs, config), inputs(config, frames, tokens=12, batch=1)
    t = torch.tensor([[1000.0, 625.0, 0.0]])
    by_token = t.repeat_interleave(config.tokens_per_frame, dim=1)
    expected = theirs(x.transpose(1, 2), by_token, text).sample.transpose(1, 2)
    assert_library_equal(bidirectional_flow(mine, config, x, t, mine.encode_text(text)), expected)


@torch.no_grad()
def test_text_padding_is_attended_as_diffusers_attends_zeros():
    theirs = transformer()
    config = config_of(theirs)
    mine, (x, t, text) = ours(theirs, config), inputs(config, 2, tokens=5)
    padded = torch.nn.functional.pad(text, (0, 0, 0, config.model.text_tokens - 5))
    expected = theirs(x.transpose(1, 2), t, padded).sample.transpose(1, 2)
    assert_library_equal(
        bidirectional_flow(mine, config, x, t[:, None].expand(-1, 2), mine.encode_text(text)), expected
    )


def test_a_clip_of_another_size_is_refused():
    theirs = transformer()
    config = config_of(theirs)
    x, t, _ = inputs(config, 2, tokens=12)
    with pytest.raises(ValueError, match=r"latents are \(8, 10\), the configuration says \(8, 12\)"):
        bidirectional_flow(ours(theirs, config), config, x[..., :10], t[:, None], [])


@pytest.mark.parametrize("source", ["pipe/transformer", "pipe"])
@torch.no_grad()
def test_a_diffusers_folder_converts(tmp_path, source):
    theirs = transformer()
    config = config_of(theirs)
    theirs.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="20KB")
    assert (tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    convert(Sources([tmp_path / source]), tmp_path / "model", config)
    mine = load_checkpoint(tmp_path / "model").model
    x, t, text = inputs(config, 3, tokens=12)
    expected = theirs(x.transpose(1, 2), t, text).sample.transpose(1, 2)
    assert_library_equal(
        bidirectional_flow(mine, config, x, t[:, None].expand(-1, 3), mine.encode_text(text)), expected
    )


@pytest.mark.parametrize("alpha", [4, 16])
@torch.no_grad()
def test_lora_merges_as_peft_merges_it(tmp_path, alpha):
    base = transformer()
    config = config_of(base)
    plain = WanTransformer3DModel.from_config(base.config)
    plain.load_state_dict(base.state_dict())
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    tuned = get_peft_model(plain, LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    lora = {name: x.clone() for name, x in get_peft_model_state_dict(tuned).items()}
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    torch.save({"generator": base.state_dict()}, tmp_path / "base.pt")
    sources = Sources([tmp_path / "base.pt", tmp_path / "lora.pt"])
    notes = convert(sources, tmp_path / "model", config, Settings(lora_alpha=alpha))
    assert any("LoRA of rank 4 on 20 weights" in note for note in notes)
    merged = ours(tuned.merge_and_unload(), config).state_dict()
    loaded = load_checkpoint(tmp_path / "model").model.state_dict()
    for name, expected in merged.items():
        assert_library_equal(loaded[name], expected)
    assert not torch.equal(merged["blocks.0.ffn.0.weight"], ours(base, config).state_dict()["blocks.0.ffn.0.weight"])
