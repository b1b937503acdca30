"""Names of tensors in other layouts, turned into the official ones (docs/method.md section 10)."""

from __future__ import annotations

import re
from collections.abc import Callable

from echo_infinity.checkpoints.entries import Entries

_WRAPPERS = re.compile(r"(^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_DIFFUSERS = [
    (r"condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"(_attn)\.to_([qkv])\.", r"\1.\2."),
    (r"(_attn)\.to_out\.0\.", r"\1.o."),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out\.", "head.head."),
]
_UMT5 = [
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
]
_VAE_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}


def official(name: str) -> str:
    """The DiT's or memory's official name without ``model.``: wrappers, PEFT's and diffusers' names undone."""
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"^(?:(?:base_model|generator|model|transformer)\.)+", "", name)
    name = name.replace(".base_layer.", ".")  # PEFT's name for a weight that has an update beside it
    for pattern, new in _DIFFUSERS:
        name = re.sub(pattern, new, name)
    return name


def umt5(name: str) -> str:
    """The name in transformers of a tensor of the original UMT5 encoder."""
    for pattern, new in _UMT5:
        name = re.sub(pattern, new, name)
    return name


def wan_vae(levels: int, residuals: int) -> Callable[[str], str]:
    """Return the map from names in the original Wan VAE to those of ``AutoencoderKLWan``.

    Args:
        levels: resolutions, ``len(dim_mult)``.
        residuals: residual blocks of a level.
    """
    decoder: dict[str, str] = {}
    at = 0
    for level in range(levels):
        for j in range(residuals + 1):
            decoder[str(at)] = f"decoder.up_blocks.{level}.resnets.{j}"
            at += 1
        if level < levels - 1:
            decoder[str(at)] = f"decoder.up_blocks.{level}.upsamplers.0"
            at += 1

    def rename(name: str) -> str:
        name = re.sub(r"^conv1\.", "quant_conv.", name)
        name = re.sub(r"^conv2\.", "post_quant_conv.", name)
        name = re.sub(r"^(encoder|decoder)\.conv1\.", r"\1.conv_in.", name)
        name = re.sub(r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out.", name)
        name = re.sub(r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out.", name)
        name = re.sub(r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0.", name)
        name = re.sub(r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0.", name)
        name = re.sub(r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1.", name)
        name = re.sub(r"^encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.", name)
        if found := re.match(r"^decoder\.upsamples\.(\d+)\.", name):
            name = f"{decoder.get(found[1], found[0].rstrip('.'))}.{name[found.end() :]}"
        for old, new in _VAE_RESIDUAL.items():
            name = name.replace(f".{old}.", f".{new}.")
        return name.replace(".shortcut.", ".conv_shortcut.")

    return rename


def rename(entries: Entries, by: Callable[[str], str], source: str) -> Entries:
    """Rename entries.

    Raises:
        ValueError: two names become the same.
    """
    found: dict[str, str] = {}
    for old in entries:
        new = by(old)
        if new in found:
            raise ValueError(f"{source} holds {found[new]} and {old}, which are the same tensor {new}")
        found[new] = old
    return {new: entries[old] for new, old in found.items()}
