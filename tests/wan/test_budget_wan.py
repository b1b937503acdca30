"""The plan's constants for the real text encoder and VAE, counted on the libraries' own models."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from echo_infinity import budget
from echo_infinity.wanvae import WanVae
from test_budget import assert_planned
from transformers import UMT5Config, UMT5EncoderModel


def test_the_vae_has_as_many_weights_and_keeps_as_much_as_the_plan_says():
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    assert sum(x.numel() for x in vae.parameters()) == budget.VAE_PARAMETERS
    codec, state = WanVae(vae).to("meta"), None
    for _ in range(3):  # from the third latent on nothing grows
        _, state = codec.decode(torch.zeros(1, 1, 16, 6, 10, device="meta"), state)
    assert sum(x.numel() for x in state.values()) == budget.VAE_STATE * 64 * 6 * 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_vae_takes_no_more_than_the_plan_says(dtype):
    with torch.device("meta"):
        codec = WanVae(AutoencoderKLWan()).to("meta", dtype).requires_grad_(False)
    assert_planned(codec, "wan", dtype)


def test_the_text_encoder_has_as_many_weights_as_the_plan_says():
    with torch.device("meta"):
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64)
        )
    assert sum(x.numel() for x in encoder.parameters()) == budget.UMT5_PARAMETERS
