"""The Wan VAE as a streaming codec: diffusers' model, driven latent by latent with its causal state carried along."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echo_infinity.checkpoints.entries import check_folder_depth
from echo_infinity.codec import SPACE_STRIDE, TIME_STRIDE, State
from echo_infinity.extras import library

VAE_DEPTH = ("num_res_blocks", "dim_mult")
_REPEAT = "Rep"  # diffusers' mark on a temporal step up that has seen one latent


@dataclass(frozen=True)
class WanVaeConfig:
    """What the generator needs to know of the codec."""

    latent_channels: int


class WanVae(nn.Module):
    """Encode and decode a stream with ``AutoencoderKLWan``, block by block, with the bits of the whole at once.

    diffusers decodes a video latent by latent and keeps the last two frames of every causal convolution's input. Here
    that list is the state between calls, so a block costs the same at any time and a stream can be saved.

    Args:
        vae: an ``AutoencoderKLWan`` with strides (4, 8, 8).

    Raises:
        ValueError: other strides, or patches.

    Source: docs/method.md section 1.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        c = vae.config
        strides = 2 ** sum(c.temperal_downsample), 2 ** (len(c.dim_mult) - 1)
        if strides != (TIME_STRIDE, SPACE_STRIDE) or c.patch_size is not None:
            raise ValueError(
                f"the VAE has strides {strides} and patch {c.patch_size}, streams need {TIME_STRIDE}, {SPACE_STRIDE} "
                "and none"
            )
        self.vae = vae
        self.config = WanVaeConfig(c.z_dim)
        vae.clear_cache()
        self._slots = {"decoder": len(vae._feat_map), "encoder": len(vae._enc_feat_map)}
        mean, std = torch.tensor(c.latents_mean), torch.tensor(c.latents_std)
        self.register_buffer("latent_mean", mean[:, None, None], persistent=False)
        self.register_buffer("latent_std", std[:, None, None], persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = next(self.vae.parameters()).dtype
        return dtype

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decode the next latents of a stream.

        Args:
            latents: ``(B, F, C, h, w)``, normalised.
            state: what the call before returned; ``None`` starts a stream.

        Returns:
            frames ``(B, 4 F - 3, 3, 8 h, 8 w)`` at the start of a stream, else ``(B, 4 F, 3, 8 h, 8 w)``, float32 in
            [-1, 1]; and the state for the next call, ``{"decoder.{i}": (B, width, 1 or 2, rows, columns)}``.

        Raises:
            ValueError: latents of another shape, or a state of another geometry.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[2] != channels or latents.shape[1] == 0:
            raise ValueError(f"latents must be (B, F >= 1, {channels}, h, w), got {tuple(latents.shape)}")
        features = self._unpack(state, "decoder")
        raw = (latents * self.latent_std + self.latent_mean).to(self.dtype)
        z = self.vae.post_quant_conv(raw.transpose(1, 2))  # (B, C, F, h, w)
        frames = []
        for i in range(z.shape[2]):
            first = {"first_chunk": True} if state is None and i == 0 else {}
            frames.append(self.vae.decoder(z[:, :, i : i + 1], feat_cache=features, feat_idx=[0], **first))
        out = torch.cat(frames, 2).clamp(-1, 1)
        return out.transpose(1, 2).float(), _pack(features, "decoder")

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encode the next pixel frames of a stream to the means of their latents.

        Args:
            frames: ``(B, N, 3, H, W)`` in [-1, 1], H and W multiples of 8; N = 4 F - 3 at the start of a stream, 4 F
                later on.
            state: what the call before returned; ``None`` starts a stream.

        Returns:
            latents ``(B, F, C, H/8, W/8)`` float32, normalised, and the state for the next call.

        Raises:
            ValueError: frames of another shape or number, or a state of another geometry.
        """
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] % SPACE_STRIDE or frames.shape[4] % SPACE_STRIDE:
            raise ValueError(
                f"frames must be (B, N, 3, H, W) with H and W multiples of {SPACE_STRIDE}, got {tuple(frames.shape)}"
            )
        first = 1 if state is None else TIME_STRIDE
        if frames.shape[1] < first or (frames.shape[1] - first) % TIME_STRIDE:
            want = "4 F" if state is not None else "4 F - 3 at the start of a stream"
            raise ValueError(f"the number of frames must be {want}, got {frames.shape[1]}; cut the video elsewhere")
        features = self._unpack(state, "encoder")
        x = frames.transpose(1, 2).to(self.dtype)
        cuts = [0, *range(first, frames.shape[1] + 1, TIME_STRIDE)]
        parts = [self.vae.encoder(x[:, :, a:b], feat_cache=features, feat_idx=[0]) for a, b in itertools.pairwise(cuts)]
        mean = self.vae.quant_conv(torch.cat(parts, 2)).chunk(2, dim=1)[0].transpose(1, 2).float()
        return (mean - self.latent_mean) / self.latent_std, _pack(features, "encoder")

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> WanVae:
        """Return the codec that a diffusers folder holds, in evaluation mode.

        Raises:
            ValueError: no such folder, corrupt files, or tensors that don't fit its configuration.
            MissingExtraError: diffusers is not installed.
        """
        diffusers = library("diffusers", "the Wan VAE")
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: not a VAE's folder")
        check_folder_depth(Path(folder), VAE_DEPTH)
        try:
            vae, report = diffusers.AutoencoderKLWan.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder} can't be read as a Wan VAE: {error}") from error
        wrong = {name: found for name, found in report.items() if found}
        if wrong:
            raise ValueError(f"{folder} doesn't fit its configuration: {wrong}")
        return cls(vae).to(device).eval().requires_grad_(False)

    def _unpack(self, state: State | None, part: str) -> list[Any]:
        """The list that diffusers carries: a tensor, its mark, or None, for each causal convolution."""
        features: list[Any] = [None] * self._slots[part]
        if state is None:
            return features
        for name, x in state.items():
            kind, _, index = name.partition(".")
            if kind != part or not index.isdigit() or int(index) >= len(features):
                raise ValueError(f"state {name!r} is no part of this VAE's {part}; start a new stream")
            features[int(index)] = _REPEAT if x.numel() == 0 else x.to(self.dtype)
        return features


def _pack(features: list[Any], part: str) -> State:
    """The same list as tensors that can be saved: the mark is an empty one, None is left out."""
    held = {f"{part}.{i}": x for i, x in enumerate(features) if x is not None}
    return {name: torch.zeros(0) if isinstance(x, str) else x.contiguous() for name, x in held.items()}
