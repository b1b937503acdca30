"""The parts around the generator, from their original files or diffusers folders: text encoder and decoders."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from echo_infinity.checkpoints.entries import Entries, check_depth, check_entries, open_weights, read_settings
from echo_infinity.checkpoints.names import rename, umt5, wan_vae
from echo_infinity.checkpoints.shards import Progress, write_shards
from echo_infinity.extras import library
from echo_infinity.taehv import decoder_only, tiny_shapes
from echo_infinity.umt5 import TEXT_DEPTH, TOKENIZER_FILES
from echo_infinity.wanvae import VAE_DEPTH

_TIED = "encoder.embed_tokens.weight"
_VAE_STEM = "diffusion_pytorch_model"


def write_text(
    source: Path, tokenizer: Path | None, folder: Path, dtype: torch.dtype, progress: Progress | None = None
) -> None:
    """Write a UMT5 encoder and its tokenizer as a folder that transformers opens.

    Args:
        source: the original ``.pth``, a transformers folder, or a diffusers folder with ``text_encoder``.
        tokenizer: its tokenizer's folder; default the source's, or ``tokenizer`` or ``google/umt5-xxl`` beside it.
        folder: to be made.
        dtype: of the weights as written.
        progress: as :func:`write_shards` takes it.

    Raises:
        ValueError: a file is refused, the tokenizer is not found, or tensors are missing, unexpected or misshapen.
        MissingExtraError: transformers is not installed.
    """
    transformers = library("transformers", "a UMT5 text encoder")
    if (source / "text_encoder").is_dir():
        tokenizer = tokenizer or source / "tokenizer"
        source = source / "text_encoder"
    entries = rename(_only_section(source), umt5, str(source))
    entries.pop(_TIED, None)
    settings = read_settings(source / "config.json") if source.is_dir() else _umt5_settings(entries, source)
    if settings.get("model_type") != "umt5":
        raise ValueError(f"{source} is a {settings.get('model_type')!r} and no 'umt5' encoder")
    check_depth(settings, TEXT_DEPTH, len(entries), str(source))
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**settings))
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items() if name != _TIED}
    check_entries(entries, expected, str(source))
    found = _tokenizer_files(source, tokenizer)
    folder.mkdir()
    for path in found:
        shutil.copyfile(path, folder / path.name)
    write_shards(folder, "model", {name: entries[name].to(dtype) for name in expected}, progress=progress)
    settings |= {"architectures": ["UMT5EncoderModel"], "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_decoder(source: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write a Wan VAE as a folder that diffusers opens.

    Args:
        source: the original ``.pth`` of Wan 2.1, a folder of ``AutoencoderKLWan``, or a diffusers folder with ``vae``.
        folder: to be made.
        progress: as :func:`write_shards` takes it.

    Raises:
        ValueError: a file is refused, or tensors are missing, unexpected or misshapen.
        MissingExtraError: diffusers is not installed.
    """
    diffusers = library("diffusers", "the Wan VAE")
    if (source / "vae").is_dir():
        source = source / "vae"
    settings = read_settings(source / "config.json") if source.is_dir() else {}
    entries = _only_section(source)
    check_depth(settings, VAE_DEPTH, len(entries), str(source))
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan.from_config(settings)
    if not source.is_dir():
        by = wan_vae(len(vae.config.dim_mult), vae.config.num_res_blocks)
        entries = rename(entries, by, str(source))
    expected = {name: tuple(x.shape) for name, x in vae.state_dict().items()}
    check_entries(entries, expected, str(source))
    folder.mkdir()
    own = {name: entries[name].to(torch.float32) for name in expected}
    write_shards(folder, _VAE_STEM, own, progress=progress)
    (folder / "config.json").write_text(json.dumps({**vae.config, "_class_name": "AutoencoderKLWan"}, indent=2) + "\n")


def write_tiny_decoder(source: Path, path: Path) -> None:
    """Write the decoder of a tiny autoencoder as one safetensors file.

    Args:
        source: its original ``.pth`` or a safetensors file.
        path: to be written.

    Raises:
        ValueError: the file is refused, or tensors are missing, unexpected or misshapen.
    """
    entries = {name: x for name, x in _only_section(source).items() if decoder_only(name)}
    expected = tiny_shapes({name: x.shape for name, x in entries.items()}, str(source))
    check_entries(entries, expected, str(source))
    write_shards(path.parent, path.stem, {name: entries[name].to(torch.float32) for name in expected})


def _only_section(source: Path) -> Entries:
    sections = open_weights(source)
    if len(sections) != 1:
        raise ValueError(f"{source} holds the sections {', '.join(map(repr, sections)) or 'none'}, expected one")
    return next(iter(sections.values()))


def _umt5_settings(entries: Entries, source: Path) -> dict[str, Any]:
    """Settings of the encoder, read off the shapes of its original file."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = entries[name].shape if name in entries else ()
        if len(found) != dims:
            raise ValueError(f"{source} is no UMT5 encoder: {name} is {found or 'missing'}, expected {dims} dims")
        return found

    layer = "encoder.block.0.layer."
    vocabulary, width = shape("shared.weight", 2)
    buckets, heads = shape(f"{layer}0.SelfAttention.relative_attention_bias.weight", 2)
    numbers = [int(m[1]) for name in entries if (m := re.match(r"encoder\.block\.(\d+)\.", name))]
    if len(entries) < max(numbers):
        raise ValueError(f"{source} numbers its layers up to {max(numbers)} but has {len(entries)} tensors")
    return {
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(f"{layer}0.SelfAttention.q.weight", 2)[0] // heads,
        "d_ff": shape(f"{layer}1.DenseReluDense.wo.weight", 2)[1],
        "num_layers": max(numbers) + 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
    }


def _tokenizer_files(source: Path, tokenizer: Path | None) -> list[Path]:
    beside = source if source.is_dir() else source.parent
    places = [tokenizer] if tokenizer else [beside, beside / "tokenizer", beside / "google" / "umt5-xxl"]
    for place in places:
        found = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
        if any(path.name in TOKENIZER_FILES[:2] for path in found):
            return found
    looked = ", ".join(str(place) for place in places)
    raise ValueError(f"no {' or '.join(TOKENIZER_FILES[:2])} of the tokenizer in {looked}; say where with --tokenizer")
