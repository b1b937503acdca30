"""A tiny streaming decoder in the TAEHV layout: real-time preview of Wan latents."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_infinity.codec import SPACE_STRIDE, TIME_STRIDE, State

_PREFIX = "decoder."
_MEMORIES = 3  # memory blocks of a stage


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the decoder.

    Args:
        latent_channels: channels of a latent.
        widths: channels of the three stages and of the last convolution.
        growth: frames that each stage makes of one.
    """

    latent_channels: int = 16
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    growth: tuple[int, int, int] = (1, 2, 2)


class _Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Memory(nn.Module):
    """A residual block that sees a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class _Grow(nn.Module):
    """One frame to ``growth`` frames."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * growth, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyDecoder(nn.Module):
    """Decode latents as :class:`echo_infinity.codec.Codec` does, faster and with less detail than the Wan VAE.

    Every latent becomes four frames; of a stream's first four only the last is shown. Nine blocks see the frame before:
    the state between calls is one feature map each.

    Args:
        config: sizes.

    Source: the layout of madebyollin's TAEHV checkpoints (names ``decoder.{i}``); takes normalised latents.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        stages: list[nn.Module] = [_Squash(), _conv(config.latent_channels, config.widths[0]), nn.ReLU()]
        for width, growth, after in zip(config.widths, config.growth, config.widths[1:], strict=False):
            stages += [_Memory(width) for _ in range(_MEMORIES)]
            stages += [nn.Upsample(scale_factor=2), _Grow(width, growth), _conv(width, after, bias=False)]
        self.decoder = nn.Sequential(*stages, nn.ReLU(), _conv(config.widths[-1], 3))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decode the next latents of a stream.

        Args:
            latents: ``(B, F, C, h, w)``.
            state: what the call before returned; ``None`` starts a stream.

        Returns:
            frames ``(B, 4 F - 3, 3, 8 h, 8 w)`` at the start of a stream, else ``(B, 4 F, 3, 8 h, 8 w)``, float32 in
            [-1, 1]; and the state for the next call, ``{"decoder.{i}": (B, width, rows, columns)}``.

        Raises:
            ValueError: latents of another shape, or a state of another geometry.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[2] != channels or latents.shape[1] == 0:
            raise ValueError(f"latents must be (B, F >= 1, {channels}, h, w), got {tuple(latents.shape)}")
        frames, carried = [], state
        for x in latents.to(self.dtype).unbind(1):  # one at a time: twelve frames at full size would take gigabytes
            part, carried = self._frames(x, carried)
            frames.append(part)
        out = torch.cat(frames, 1).float().clamp(0, 1) * 2 - 1
        return (out if state else out[:, TIME_STRIDE - 1 :]), carried or {}

    def _frames(self, x: Tensor, before: State | None) -> tuple[Tensor, State]:
        """``(B, C, h, w)`` to ``(B, 4, 3, 8 h, 8 w)``, and the state after it."""
        batch, after = len(x), {}
        for i, module in enumerate(self.decoder):
            if not isinstance(module, _Memory):
                x = module(x)
                continue
            name, now = f"{_PREFIX}{i}", x.unflatten(0, (batch, -1))
            first = _carried(before, name, now[:, 0])
            after[name] = now[:, -1].clone()
            x = module(x, torch.cat([first[:, None], now[:, :-1]], 1).flatten(0, 1))
        return x.unflatten(0, (batch, -1)), after

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Refuse: this codec only decodes.

        Raises:
            ValueError: always.
        """
        raise ValueError("the tiny decoder can't encode frames: load the model with decoder='wan'")

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TinyDecoder:
        """Return the decoder that a safetensors file holds, in evaluation mode.

        Raises:
            ValueError: missing, corrupt, or tensors of another layout.
        """
        from echo_infinity.weights import read_tensors

        tensors = read_tensors(path, device)
        expected = tiny_shapes({name: x.shape for name, x in tensors.items()}, str(path))
        wrong = sorted(expected.keys() ^ tensors.keys())
        wrong += [name for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name]]
        if wrong:
            raise ValueError(f"{path} doesn't fit the TAEHV layout: missing, extra or misshapen: {', '.join(wrong)}")
        decoder = cls(_config({name: x.shape for name, x in tensors.items()}, str(path)))
        decoder.load_state_dict(tensors)
        return decoder.to(device).eval()


def tiny_shapes(shapes: Mapping[str, torch.Size | tuple[int, ...]], source: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the decoder whose file has these shapes.

    Raises:
        ValueError: it is not in the TAEHV layout, or scales time or space by other factors than the Wan VAE.
    """
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in TinyDecoder(_config(shapes, source)).state_dict().items()}


def _config(shapes: Mapping[str, torch.Size | tuple[int, ...]], source: str) -> TinyConfig:
    def shape(index: int, part: str = "weight") -> tuple[int, ...]:
        found = tuple(shapes.get(f"{_PREFIX}{index}.{part}", ()))
        if len(found) != 4:
            raise ValueError(
                f"{source} is not in the TAEHV layout: {_PREFIX}{index}.{part} is {found or 'missing'}, expected 4 dims"
            )
        return found

    stage = _MEMORIES + 3
    first, last = shape(1), shape(4 + 3 * stage)
    widths = (first[0], *(shape(2 + (i + 1) * stage)[0] for i in range(3)))
    grown = [shape(1 + (i + 1) * stage, "conv.weight") for i in range(3)]
    growth = tuple(g[0] // max(1, g[1]) for g in grown)
    frames = growth[0] * growth[1] * growth[2]
    if frames != TIME_STRIDE or last[0] != 3:
        patch = round((last[0] / 3) ** 0.5)
        raise ValueError(
            f"{source} makes {frames} frames and {SPACE_STRIDE * patch} x {SPACE_STRIDE * patch} pixels of a latent, "
            f"the Wan 2.1 models need {TIME_STRIDE} and {SPACE_STRIDE} x {SPACE_STRIDE}"
        )
    return TinyConfig(first[1], widths, growth)  # type: ignore[arg-type]


def decoder_only(name: str) -> bool:
    """Whether a tensor of a TAEHV file belongs to the decoder."""
    return re.match(r"decoder\.\d+\.", name) is not None


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _carried(state: State | None, name: str, like: Tensor) -> Tensor:
    if not state:
        return torch.zeros_like(like)
    if name not in state or state[name].shape != like.shape:
        found = tuple(state[name].shape) if name in state else sorted(state)
        raise ValueError(f"state {name!r} must be {tuple(like.shape)}, got {found}; start a new stream")
    return state[name].to(like)
