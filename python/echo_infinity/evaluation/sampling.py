"""Streams to be judged: under any policy, with their decoder, and a state to go on from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from echo_infinity.cache import KV
from echo_infinity.codec import State, to_uint8
from echo_infinity.noise import Noise, counter_noise
from echo_infinity.policies import make_sampler
from echo_infinity.weights import Checkpoint


class Rollout:
    """Streams side by side with pixels: generate or observe blocks, switch prompts, save and go on.

    Each stream draws its noise from a seed of its own, so what it shows does not depend on the others beside it.

    Args:
        checkpoint: the model.
        policy: a name in ``echo_infinity.policies.POLICIES``; None is the one that the model was trained under.
        prompts: one a stream.
        seeds: one a stream.
    """

    def __init__(
        self, checkpoint: Checkpoint, policy: str | None, prompts: Sequence[str], seeds: Sequence[int]
    ) -> None:
        self.checkpoint = checkpoint
        self.sampler = make_sampler(checkpoint, policy, self._text(prompts), _noise(seeds), len(seeds))
        self._decoder: State | None = None

    @torch.inference_mode()
    def next_block(self) -> tuple[Tensor, Tensor]:
        """Generate a block: latents ``(B, F, C, h, w)`` and frames ``(B, N, 3, H, W)`` uint8."""
        latents = self.sampler.next_block()
        return latents, self.decode(latents)

    @torch.inference_mode()
    def observe(self, latents: Tensor) -> None:
        """Take a block ``(B, F, C, h, w)`` as given."""
        self.sampler.observe(latents)
        # All that the codec carries on is of the last latent frame: no need to decode the others.
        self._decoder = self.checkpoint.codec.decode(latents[:, -1:])[1]

    @torch.inference_mode()
    def switch(self, prompts: Sequence[str]) -> None:
        """Change every stream's prompt at the coming block."""
        self.sampler.switch(self._text(prompts))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later block depends on, by name."""
        named = {f"sampler.{name}": x for name, x in self.sampler.tensors().items()}
        return named | {f"decoder.{name}": x for name, x in (self._decoder or {}).items()}

    def load_tensors(self, named: dict[str, Tensor], frame: int) -> None:
        """Go on from what :meth:`tensors` returned, at latent frame ``frame``."""
        self.sampler.load_tensors(part(named, "sampler."), frame)
        device = self.sampler.generator.device
        self._decoder = {name: x.to(device, copy=True) for name, x in part(named, "decoder.").items()} or None

    @torch.inference_mode()
    def _text(self, prompts: Sequence[str]) -> list[KV]:
        return self.checkpoint.model.encode_text(self.checkpoint.text.encode(list(prompts)))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the frames ``(B, N, 3, H, W)`` uint8 of a generated block; each block once, in order."""
        pixels, self._decoder = self.checkpoint.codec.decode(latents, self._decoder)
        return to_uint8(pixels)


def part(named: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}


def _noise(seeds: Sequence[int]) -> Noise:
    own = [counter_noise(seed) for seed in seeds]

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([one(block, step, (1, *shape[1:])) for one in own])

    return noise
