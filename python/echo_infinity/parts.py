"""Text encoder and codec of a model folder: which ones are there, which one is asked for, and what stands in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from echo_infinity.codec import Codec, State, VideoCodec
from echo_infinity.config import EchoConfig
from echo_infinity.taehv import TinyDecoder
from echo_infinity.text import TextEncoder
from echo_infinity.umt5 import KEEPS, PrecomputedText, Umt5Text, cache_folder
from echo_infinity.wanvae import WanVae

CODEC, TEXT_FOLDER, DECODER_FOLDER, TINY_DECODER = "codec.safetensors", "text", "vae", "tiny_decoder.safetensors"
DECODERS = ("own", "wan", "tiny", "none")
_PLACES = {"own": CODEC, "wan": DECODER_FOLDER, "tiny": TINY_DECODER}


@dataclass(frozen=True)
class PartOptions:
    """Which text encoder and decoder to use, and how.

    Args:
        text: an encoder's folder, or a safetensors file of precomputed embeddings; None for the model's own.
        text_device: where the encoder computes; None for the model's device.
        text_dtype: of the encoder's weights; None for the file's.
        text_keep: what becomes of the encoder after a prompt: ``loaded``, ``cpu`` (moved there) or ``freed``.
        text_cache: folder that keeps embeddings by content; "" keeps none; None for the user's cache folder.
        decoder: ``own`` (trained with the model), ``wan``, ``tiny``, or ``none`` (latents only); None for the first
            of them that the folder holds.
        decoder_dtype: of the Wan VAE's or the tiny decoder's weights.
    """

    text: str | os.PathLike[str] | None = None
    text_device: torch.device | str | None = None
    text_dtype: torch.dtype | None = None
    text_keep: str = "loaded"
    text_cache: str | os.PathLike[str] | None = None
    decoder: str | None = None
    decoder_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.text_keep not in KEEPS:
            raise ValueError(f"text_keep must be one of {', '.join(KEEPS)}, got {self.text_keep!r}")
        if self.decoder is not None and self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")


class LatentsOnlyConfig(NamedTuple):
    """Stands where a codec's configuration would."""

    latent_channels: int


class LatentsOnly:
    """Stands in for a codec where a folder holds none, or none is wanted."""

    def __init__(self, channels: int, reason: str) -> None:
        self.config, self.reason = LatentsOnlyConfig(channels), reason

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Refuse, with the reason."""
        raise ValueError(self.reason)

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Refuse, with the reason."""
        raise ValueError(self.reason)


class NoText:
    """Stands in for a text encoder where a folder holds none."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Refuse, with the reason."""
        raise ValueError(self.reason)


def open_text(folder: Path, config: EchoConfig, options: PartOptions, device: torch.device | str) -> TextEncoder:
    """Return the text encoder of a model whose own is not a learned vocabulary.

    Raises:
        ValueError: what was asked for is not there or doesn't fit.
    """
    m = config.model
    source = Path(options.text) if options.text is not None else folder / TEXT_FOLDER
    if source.is_file():
        return PrecomputedText(source, m.text_tokens, m.text_width)
    if options.text is None and not source.is_dir():
        return NoText(
            f"{folder} holds no text encoder: add one with 'echo-infinity convert --text', or give a folder or a file "
            "of embeddings as text"
        )
    cache = cache_folder() if options.text_cache is None else options.text_cache or None
    return Umt5Text(
        source,
        m.text_tokens,
        m.text_width,
        device=options.text_device or device,
        dtype=options.text_dtype,
        keep=options.text_keep,
        cache=cache,
    )


def codec_path(folder: Path, decoder: str | None) -> Path | None:
    """File or folder of the codec that is asked for; None for latents only.

    Raises:
        ValueError: the folder doesn't hold it.
    """
    held = [name for name, place in _PLACES.items() if (folder / place).exists()]
    if decoder is None:
        return folder / _PLACES[held[0]] if held else None
    if decoder == "none":
        return None
    if decoder not in held:
        raise ValueError(f"{folder} holds no decoder {decoder!r}, but: {', '.join(held) or 'none'}")
    return folder / _PLACES[decoder]


def open_codec(path: Path | None, channels: int, device: torch.device | str, dtype: torch.dtype) -> VideoCodec:
    """Load a codec from :func:`codec_path`.

    Raises:
        ValueError: corrupt, or made for latents of another width.
    """
    if path is None:
        return LatentsOnly(channels, "the model was loaded without a decoder: ask for latents, or load one")
    codec: Codec | WanVae | TinyDecoder
    if path.name == CODEC:
        codec = Codec.load(path, device=device)
    elif path.name == DECODER_FOLDER:
        codec = WanVae.load(path, device, dtype)
    else:
        codec = TinyDecoder.load(path, device).to(dtype)
    if codec.config.latent_channels != channels:
        raise ValueError(f"the codec has {codec.config.latent_channels} latent channels, the model {channels}")
    return codec.eval().requires_grad_(False)
