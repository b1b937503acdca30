"""Small random models of the real libraries, and ours with the same weights."""

import functools

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from echo_infinity.checkpoints.names import official
from echo_infinity.config import EchoConfig, ModelConfig
from echo_infinity.model import CausalDiT, sinusoid

# diffusers' own test configuration of the model, but for names that differ here.
SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def transformer(seed=0, **sizes):
    """A WanTransformer3DModel with random weights, norms and biases."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**SIZES | sizes).eval()
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, 1.0 if norm else 0.0, 0.15)
    return model


def with_exact_angles(model):
    """The same model with its timestep's sinusoid in float64, as the official code has it.

    diffusers forms the angles in float32, which is off by up to 3e-5 at timestep 1000 and moves the flow by 1e-4.
    """
    width = model.config.freq_dim
    model.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, width).float()
    return model


def config_of(model, rows=8, columns=12, tokens=12):
    """Our configuration of a WanTransformer3DModel."""
    c = model.config
    return EchoConfig(
        model=ModelConfig(
            width=c.num_attention_heads * c.attention_head_dim,
            heads=c.num_attention_heads,
            layers=c.num_layers,
            ffn=c.ffn_dim,
            latent_channels=c.in_channels,
            text_tokens=tokens,
            text_width=c.text_dim,
            time_width=c.freq_dim,
        ),
        latent_rows=rows,
        latent_columns=columns,
    )


def ours(model, config):
    """Our DiT with the weights of a WanTransformer3DModel."""
    dit = CausalDiT(config.model)
    dit.load_state_dict({official(name): x for name, x in model.state_dict().items()})
    return dit.eval()


@functools.cache
def vae(seed=0):
    """A small AutoencoderKLWan with random weights."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, -0.3, 0.4],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    ).eval()
