"""Streaming latent <-> pixel: a small video autoencoder, causal in time, strides (4, 8, 8)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

TIME_STRIDE = 4
SPACE_STRIDE = 8
State = dict[str, Tensor]


class VideoCodec(Protocol):
    """What a stream needs of a codec; :class:`Codec` says what the methods take and return."""

    config: Any  # with latent_channels

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of the codec.

    Args:
        latent_channels: channels of a latent.
        encoder_width: encoder channels at 1/4 resolution.
        encoder_deep_width: encoder channels at 1/8 resolution.
        decoder_width: decoder channels at 1/8 resolution.
        middle_width: decoder channels at 1/4 resolution, the four frames of a group together.
        frame_width: decoder channels at 1/2 resolution, each frame on its own.
    """

    latent_channels: int = 8
    encoder_width: int = 64
    encoder_deep_width: int = 96
    decoder_width: int = 96
    middle_width: int = 64
    frame_width: int = 24

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a positive int, got {value!r}")


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)  # an identity at the start: no norm layers are needed

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class _Encoder(nn.Module):
    """A group of four frames, and the features of the group before it, to one latent."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width, deep = config.encoder_width, config.encoder_deep_width
        self.stem = nn.Conv2d(TIME_STRIDE * 3 * 16, width, 3, padding=1)
        self.quarter = _Residual(width)
        self.down = nn.Conv2d(width, deep, 4, stride=2, padding=1)
        self.past = nn.Conv2d(deep, deep, 1)
        self.eighth = _Residual(deep)
        self.head = nn.Conv2d(deep, config.latent_channels, 1)

    def features(self, groups: Tensor) -> Tensor:
        """(N, 12, H, W) -> (N, deep, H/8, W/8), of one group alone."""
        return self.down(F.relu(self.quarter(self.stem(F.pixel_unshuffle(groups, 4)))))

    def forward(self, now: Tensor, before: Tensor) -> Tensor:
        return self.head(F.relu(self.eighth(now + self.past(F.relu(before)))))


class _Decoder(nn.Module):
    """One latent, and the features of the latent before it, to a group of four frames."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width, middle, frame = config.decoder_width, config.middle_width, config.frame_width
        self.stem = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.past = nn.Conv2d(width, width, 1)
        self.eighth = nn.Sequential(_Residual(width), _Residual(width))
        self.to_quarter = nn.Conv2d(width, middle * 4, 1)
        self.quarter = _Residual(middle)
        self.to_half = nn.Conv2d(middle, TIME_STRIDE * frame * 4, 1)
        self.smooth = nn.Conv2d(frame, frame, 3, padding=1)
        self.head = nn.Conv2d(frame, 3 * 4, 3, padding=1)

    def features(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, width, h, w), of one latent alone."""
        return self.stem(latents)

    def forward(self, now: Tensor, before: Tensor) -> Tensor:
        """Return (N, 4, 3, 8 h, 8 w)."""
        x = self.eighth(now + self.past(F.relu(before)))
        x = self.quarter(F.pixel_shuffle(self.to_quarter(F.relu(x)), 2))
        x = F.relu(F.pixel_shuffle(self.to_half(F.relu(x)), 2))  # (N, 4 frame, 4 h, 4 w)
        n, _, rows, columns = x.shape
        x = x.reshape(n * TIME_STRIDE, -1, rows, columns)  # the four frames part here
        x = x + F.relu(self.smooth(x))
        x = F.pixel_shuffle(self.head(x), 2)
        return x.reshape(n, TIME_STRIDE, 3, 2 * rows, 2 * columns)


class Codec(nn.Module):
    """Encoder and decoder between pixel frames and latents normalised to zero mean and unit variance.

    Time is cut into groups: the first pixel frame alone (repeated to a group of four), then four frames a latent,
    so F latents stand for 4 F - 3 pixel frames. A latent is a function of its own group and of the one before;
    so is a decoded group of its latent and the one before. A stream therefore carries one feature map each way,
    and any chunking computes the same sums (the results may differ by rounding, where another batch size makes
    the convolution library add in another order).
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        self.config = config or CodecConfig()
        self.encoder = _Encoder(self.config)
        self.decoder = _Decoder(self.config)
        self.register_buffer("latent_mean", torch.zeros(self.config.latent_channels))
        self.register_buffer("latent_std", torch.ones(self.config.latent_channels))

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encode the next pixel frames of a stream.

        Args:
            frames: ``(B, N, 3, H, W)`` in [-1, 1], H and W multiples of 8; N = 4 F - 3 at the start of a
                stream, 4 F later on.
            state: what the call before returned; ``None`` starts a stream.

        Returns:
            latents ``(B, F, C, H/8, W/8)``, and the state for the next call: ``{"encoder": (B, deep width, h, w)}``.

        Raises:
            ValueError: frames of another shape or number, or a state of another geometry.
        """
        raw, carried = self.encode_raw(frames, state)
        mean, std = self.latent_mean[:, None, None], self.latent_std[:, None, None]
        return (raw - mean) / std, carried

    def encode_raw(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return what ``encode`` returns, before the latents are normalised."""
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] % SPACE_STRIDE or frames.shape[4] % SPACE_STRIDE:
            raise ValueError(
                f"frames must be (B, N, 3, H, W) with H and W multiples of {SPACE_STRIDE}, got {tuple(frames.shape)}"
            )
        first = 0 if state else TIME_STRIDE - 1
        if frames.shape[1] == 0 or (frames.shape[1] + first) % TIME_STRIDE:
            want = "4 F" if state else "4 F - 3 at the start of a stream"
            raise ValueError(f"the number of frames must be {want}, got {frames.shape[1]}; cut the video elsewhere")
        if not state:
            frames = torch.cat([frames[:, :1].expand(-1, TIME_STRIDE - 1, -1, -1, -1), frames], 1)
        b, n, _, rows, columns = frames.shape
        groups = frames.reshape(b * n // TIME_STRIDE, TIME_STRIDE * 3, rows, columns)
        now = self.encoder.features(groups)
        before, carried = _shift(now, b, state, "encoder")
        latents = self.encoder(now, before)
        return latents.reshape(b, n // TIME_STRIDE, *latents.shape[1:]), carried

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decode the next latents of a stream.

        Args:
            latents: ``(B, F, C, h, w)``.
            state: what the call before returned; ``None`` starts a stream.

        Returns:
            frames ``(B, 4 F - 3, 3, 8 h, 8 w)`` at the start of a stream, else ``(B, 4 F, 3, 8 h, 8 w)``, about in
            [-1, 1] but not clamped; and the state for the next call: ``{"decoder": (B, width, h, w)}``.

        Raises:
            ValueError: latents of another shape, or a state of another geometry.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[2] != channels or latents.shape[1] == 0:
            raise ValueError(f"latents must be (B, F >= 1, {channels}, h, w), got {tuple(latents.shape)}")
        mean, std = self.latent_mean[:, None, None], self.latent_std[:, None, None]
        latents = latents * std + mean
        b, f = latents.shape[:2]
        now = self.decoder.features(latents.flatten(0, 1))
        before, carried = _shift(now, b, state, "decoder")
        frames = self.decoder(now, before)
        frames = frames.reshape(b, f * TIME_STRIDE, *frames.shape[2:])
        return (frames if state else frames[:, TIME_STRIDE - 1 :]), carried

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, normalisation and config to a safetensors file; an existing file is replaced at once."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, partial, metadata={"codec_config": json.dumps(asdict(self.config))})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Codec:
        """Return the codec a file holds, in evaluation mode.

        Raises:
            ValueError: the file is no safetensors file, is cut short, has no codec config, or its tensors don't
                fit the config.
            FileNotFoundError: there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no codec at {path}; train one with 'echo-infinity train codec'")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read as a codec (cut short or corrupt?): {error}") from error
        try:
            config = CodecConfig(**json.loads(metadata["codec_config"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has no usable codec_config in its metadata ({error}); is it a codec?") from error
        codec = cls(config)
        own = codec.state_dict()
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [n for n in sorted(own.keys() & tensors.keys()) if own[n].shape != tensors[n].shape]
        if wrong:
            raise ValueError(f"{path} does not fit its config {config}: missing, extra or misshapen: {wrong}")
        codec.load_state_dict(tensors)
        return codec.to(device).eval()


def latent_count(pixel_frames: int) -> int:
    """Return the number of latents of a stream's first ``4 F - 3`` pixel frames."""
    if pixel_frames < 1 or (pixel_frames - 1) % TIME_STRIDE:
        raise ValueError(f"the number of pixel frames must be 4 F - 3, got {pixel_frames}")
    return (pixel_frames - 1) // TIME_STRIDE + 1


def to_unit(frames: Tensor) -> Tensor:
    """Return uint8 frames as float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1.0


def to_uint8(frames: Tensor) -> Tensor:
    """Return frames in [-1, 1], clamped, as uint8."""
    return ((frames.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def _shift(now: Tensor, batch: int, state: State | None, name: str) -> tuple[Tensor, State]:
    """Return each group's predecessor's features (zeros at the start of a stream), and the state after the last."""
    grouped = now.reshape(batch, -1, *now.shape[1:])
    if state:
        if name not in state or state[name].shape != grouped[:, 0].shape:
            found = tuple(state[name].shape) if name in state else sorted(state)
            raise ValueError(f"state {name!r} must be {tuple(grouped[:, 0].shape)}, got {found}; start a new stream")
        first = state[name].to(grouped.dtype)[:, None]
    else:
        first = torch.zeros_like(grouped[:, :1])
    return torch.cat([first, grouped[:, :-1]], 1).flatten(0, 1), {name: grouped[:, -1].clone()}
