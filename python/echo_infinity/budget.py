"""What a stream takes of a device's memory, by arithmetic, and the settings that fit it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from echo_infinity.config import EchoConfig
from echo_infinity.weights import MEMORY_PREFIX

GIB = 1 << 30
RUNTIME = {"cpu": int(0.28 * GIB), "cuda": int(0.6 * GIB)}  # torch in a process; a CUDA context with its libraries
UMT5_PARAMETERS = 5_680_910_336  # the XXL encoder
VAE_PARAMETERS = 126_892_531  # AutoencoderKLWan, encoder and decoder
VAE_STATE = 2364.5  # values kept for each pixel of a frame: two frames of every causal convolution's input
_VAE_WORK = 8 * 4 * 96  # values a pixel at the widest point: eight tensors of four frames, 96 channels
_TINY_PARAMETERS = 9_844_611  # of the TAEHV decoder
_TINY_STATE = 5376 / 64  # values a pixel
_TINY_WORK = 4 * 4 * 64
# Bytes of a value in work: measured at the official geometry in bfloat16, see docs/performance.md.
_APPEND_WORK = 28  # norm and rotation of queries and keys, in float32
_WRITE_WORK = 34  # a memory token's value in the write
_SLACK = 0.03  # what an allocator can't use

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Choice:
    """Settings that decide the memory; the names of ``echo-infinity generate``'s options.

    Args:
        dtype: of generator and cache.
        weights: "full" or "fp8".
        kv: "full" or "fp8".
        text: where the encoder computes: "cuda", "cpu", or "file" for precomputed embeddings.
        decoder: "own", "wan", "tiny" or "none".
        decoder_dtype: of "wan" and "tiny".
        streams: that run at once on the same weights.
        prompts: text keys and values held at once: a stream's own, and one that a switch brings.
    """

    dtype: str = "bfloat16"
    weights: str = "full"
    kv: str = "full"
    text: str = "cpu"
    decoder: str = "wan"
    decoder_dtype: str = "bfloat16"
    streams: int = 1
    prompts: int = 2

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.dtype), ("decoder_dtype", self.decoder_dtype)):
            if value not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
        if self.streams < 1:
            raise ValueError(f"streams must be at least 1, got {self.streams}")


def items(config: EchoConfig, choice: Choice, device: str = "cuda") -> dict[str, int]:
    """Bytes on the device, by what takes them.

    Args:
        config: geometry.
        choice: settings.
        device: "cuda", or "cpu" where everything is in one process's memory.
    """
    m, w = config.model, config.window
    size, width, tokens = DTYPES[choice.dtype], m.width, config.tokens_per_frame
    linears, rest, memory = _parameters(config)
    held = choice.streams * w.window_frames * tokens * width
    narrowed = m.layers - 1 if choice.kv == "fp8" else 0
    ring = 2 * held * ((m.layers - narrowed) * size + narrowed) + 2 * narrowed * held // m.head_dim * 4
    ring += 2 * held * size if narrowed else 0  # the buffer that layers are widened into
    ring += held * size if config.memory is not None and w.relative else 0
    found = {
        "generator's weights": (linears if choice.weights == "fp8" else linears * size) + rest * size,
        "memory's weights": memory * size,
        "cached keys and values": ring,
        "memory's state, keys and values": _memory_state(config, choice),
        "text's keys and values": choice.streams * choice.prompts * 2 * m.layers * m.text_tokens * width * size,
        "latents and noise": _latents(config, choice),
        "work of a block": _work(config, choice, w.frames_per_block),
        "more work at a prompt switch": _work(config, choice, w.window_frames)
        - _work(config, choice, w.frames_per_block),
    }
    found |= _decoder(config, choice)
    if choice.text == device:
        found["text encoder"] = UMT5_PARAMETERS * 2
    found["torch and its libraries"] = RUNTIME[device]
    if device == "cuda":
        found["lost to the allocator"] = int(_SLACK * sum(found.values()))
    return {name: size for name, size in found.items() if size}


def choices(first: Choice) -> Iterator[Choice]:
    """Settings from the best picture to the least memory, beginning with ``first``."""
    yield first
    yield (off := replace(first, text="cpu" if first.text == "cuda" else first.text))
    yield (half := replace(off, decoder_dtype="bfloat16"))
    yield (ring := replace(half, kv="fp8"))
    if first.decoder == "wan":
        yield replace(half, decoder="tiny")
        yield replace(ring, decoder="tiny")
        ring = replace(ring, decoder="tiny")
    yield replace(ring, weights="fp8")


def pick(config: EchoConfig, capacity: int, first: Choice | None = None) -> Choice | None:
    """The first of :func:`choices` that fits ``capacity`` bytes; None if none does."""
    for choice in choices(first or Choice(text="cuda", decoder_dtype="float32")):
        if sum(items(config, choice).values()) <= capacity:
            return choice
    return None


def capacity(text: str) -> int:
    """Bytes of a GPU's memory as people write it: ``24GB`` and ``24GiB`` both mean 24 * 2**30, as makers count.

    Raises:
        ValueError: no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"a GPU's memory is written like 24GB, got {text!r}")
    return int(float(found[1]) * GIB)


@functools.cache
def _parameters(config: EchoConfig) -> tuple[int, int, int]:
    """Weights of the blocks' linear layers, other weights of the DiT, weights of the memory."""
    from echo_infinity.checkpoints.convert import expected_shapes

    counts = {name: torch.Size(shape).numel() for name, shape in expected_shapes(config).items()}
    memory = sum(n for name, n in counts.items() if name.startswith(MEMORY_PREFIX))
    linear = r"model\.blocks\.\d+\.(self_attn|cross_attn|ffn)\.[qkvo02]\.weight"
    linears = sum(n for name, n in counts.items() if re.fullmatch(linear, name))
    return linears, sum(counts.values()) - memory - linears, memory


def _memory_state(config: EchoConfig, choice: Choice) -> int:
    if config.memory is None:
        return 0
    tokens = config.memory.groups * config.memory.tokens * config.model.width * choice.streams
    return tokens * DTYPES[choice.dtype] * 3 * 2  # state, keys, values; the old ones live until the new are there


def _latents(config: EchoConfig, choice: Choice) -> int:
    frames = config.window.window_frames + 4 * config.window.frames_per_block
    values = config.model.latent_channels * config.latent_rows * config.latent_columns
    return choice.streams * frames * values * 4


def _work(config: EchoConfig, choice: Choice, frames: int) -> int:
    """Peak of what a pass makes and drops, over its phases, and of the memory's write beside it."""
    m, size = config.model, DTYPES[choice.dtype]
    tokens = choice.streams * frames * config.tokens_per_frame
    append = tokens * m.width * _APPEND_WORK * max(1.0, size / 2)
    feed_forward = tokens * (2 * m.width + 2 * m.ffn) * size
    write = 0.0
    if config.memory is not None:
        write = choice.streams * config.memory.tokens * m.width * _WRITE_WORK * max(1.0, size / 2)
    widened = 3 * m.width * m.ffn * 2 if choice.weights == "fp8" else 0  # one layer's weight in float32 and in use
    return int(max(append, feed_forward) + write + widened)


def _decoder(config: EchoConfig, choice: Choice) -> dict[str, int]:
    size = DTYPES[choice.decoder_dtype]
    pixels = choice.streams * 64 * config.latent_rows * config.latent_columns
    frames = pixels * 3 * 4 * 4 * config.window.frames_per_block  # a block's pixels in float32
    if choice.decoder == "none":
        return {}
    if choice.decoder == "own":
        return {"decoder": 4 << 20, "decoder's work": 2 * frames}
    parameters, state, work = {
        "wan": (VAE_PARAMETERS, VAE_STATE, _VAE_WORK),
        "tiny": (_TINY_PARAMETERS, _TINY_STATE, _TINY_WORK),
    }[choice.decoder]
    return {
        "decoder": parameters * size,
        "decoder's state, old and new": int(2 * state * pixels) * size,
        "decoder's work": int(work * pixels) * size + 2 * frames,
    }
