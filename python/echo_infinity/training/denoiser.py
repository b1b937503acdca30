"""Bidirectional models over whole clips: the teacher, and the fake score that learns what the student makes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from echo_infinity.cache import KV, Geometry
from echo_infinity.codec import Codec
from echo_infinity.config import EchoConfig, WindowConfig
from echo_infinity.functional import FunctionalKV
from echo_infinity.model import CausalDiT
from echo_infinity.ranks import Ranks
from echo_infinity.text import GrammarText
from echo_infinity.training.distributed import whole
from echo_infinity.training.losses import guide, to_x0
from echo_infinity.weights import Checkpoint, save_checkpoint

Prompts = Sequence[str | None]
"""One a row; None is the empty prompt of classifier-free guidance."""


def whole_clip(config: EchoConfig, frames: int) -> EchoConfig:
    """Return the configuration of a bidirectional model of the same shape: one block of ``frames``, no memory."""
    window = WindowConfig(sink_frames=0, window_frames=frames, frames_per_block=frames, p_max=frames)
    name = config.name.removesuffix("-whole") + "-whole"
    return replace(config, name=name, window=window, memory=None, policy="evolving")


def clip_flow(model: CausalDiT, geometry: Geometry, x: Tensor, sigma: Tensor, text: list[KV]) -> Tensor:
    """Return the flow of whole clips in which every frame attends to every frame.

    Args:
        model: the DiT.
        geometry: of a configuration from :func:`whole_clip`.
        x: ``(B, F, C, h, w)`` noisy latents.
        sigma: ``(B,)`` their noise levels.
        text: per layer K/V of the prompts.

    Returns:
        ``(B, F, C, h, w)`` float32.
    """
    level = model.condition(1000 * sigma.view(-1, 1))
    flow = model(x, level, text, FunctionalKV(geometry.config), geometry.call(0, x.shape[1]))
    assert flow is not None
    return flow.float()


def check_words(checkpoint: Checkpoint) -> None:
    """Raise unless a model has learned its own words: others' text encoders can't be trained along."""
    if not isinstance(checkpoint.text, GrammarText):
        raise ValueError(
            f"{checkpoint.config.name} reads prompts with {type(checkpoint.text).__name__}; these stages train models "
            "that have learned their own words, as the bundled one"
        )


def encode_prompts(model: CausalDiT, text: GrammarText, prompts: Prompts) -> list[KV]:
    """Return each layer's K/V of prompts."""
    return model.encode_text(text.embed([[] if prompt is None else text.tokenise(prompt) for prompt in prompts]))


class Denoiser:
    """A bidirectional model as loaded from a folder that ``train flow --bidirectional`` exported.

    Args:
        checkpoint: the model; its parts are copied.
        ranks: the processes that share the run.
        trained: whether its weights may be trained; else they are frozen.

    Raises:
        ValueError: the model is causal, or reads prompts with another's encoder.
    """

    def __init__(self, checkpoint: Checkpoint, ranks: Ranks, *, trained: bool) -> None:
        w = checkpoint.config.window
        if w.frames_per_block != w.window_frames or checkpoint.memory is not None:
            raise ValueError(
                f"{checkpoint.config.name} is a causal model ({w.frames_per_block} frames a block): give one that "
                "'train flow --bidirectional' made"
            )
        check_words(checkpoint)
        self.config, self.frames = checkpoint.config, w.frames_per_block
        self.model, self.text = copy.deepcopy(checkpoint.model), copy.deepcopy(checkpoint.text)
        self.geometry = Geometry(self.config, ranks.device)
        for module in (self.model, self.text):
            module.to(ranks.device).requires_grad_(trained)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter with its part's name in front."""
        parts: tuple[tuple[str, nn.Module], ...] = ("model", self.model), ("text", self.text)
        return [(f"{part}.{name}", x) for part, module in parts for name, x in module.named_parameters()]

    def encode(self, prompts: Prompts) -> list[KV]:
        """Return each layer's K/V of prompts."""
        return encode_prompts(self.model, self.text, prompts)

    def flow(self, x_t: Tensor, sigma: Tensor, text: list[KV]) -> Tensor:
        """Return the flow of whole clips; see :func:`clip_flow`."""
        return clip_flow(self.model, self.geometry, x_t, sigma, text)

    def x0(self, x_t: Tensor, sigma: Tensor, text: list[KV]) -> Tensor:
        """Return the clean latents that the model sees in ``x_t``."""
        return to_x0(x_t, self.flow(x_t, sigma, text), sigma)

    def guided_flow(self, x_t: Tensor, sigma: Tensor, prompts: Prompts, scale: float) -> Tensor:
        """Return the flow under classifier-free guidance; ``scale`` 1 asks the model once."""
        flow = self.flow(x_t, sigma, self.encode(prompts))
        if scale == 1:
            return flow
        return guide(flow, self.flow(x_t, sigma, self.encode([None] * len(prompts))), scale)

    def export(self, folder: Path, codec: Codec, ranks: Ranks) -> None:
        """Write a model folder; every process must ask for it."""
        named = {name: whole(x) for name, x in self.named_parameters()}
        if ranks.rank > 0:
            return
        model = CausalDiT(self.config.model)
        model.load_state_dict({n.removeprefix("model."): x for n, x in named.items() if n.startswith("model.")})
        text = GrammarText(self.text.vocabulary, self.text.tokens, self.config.model.text_width)
        text.load_state_dict({n.removeprefix("text."): x for n, x in named.items() if n.startswith("text.")})
        save_checkpoint(folder, self.config, model, None, text, codec)
