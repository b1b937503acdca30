"""The DiT as its base model was trained: every frame of a clip attends to every frame, under absolute ids."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from echo_infinity.cache import KV, Geometry
from echo_infinity.config import EchoConfig, WindowConfig
from echo_infinity.functional import FunctionalKV
from echo_infinity.model import CausalDiT


def bidirectional_flow(model: CausalDiT, config: EchoConfig, x: Tensor, t: Tensor, text: list[KV]) -> Tensor:
    """Predict the flow of a whole clip at once; gradients pass.

    Args:
        model: the DiT.
        config: its geometry; window and memory play no part.
        x: ``(B, F, C, h, w)`` noisy latents.
        t: ``(B, F)`` timesteps in 0 .. 1000, or ``(B, 1)`` where all frames share one.
        text: from :meth:`CausalDiT.encode_text`.

    Returns:
        ``(B, F, C, h, w)`` predicted flow, noise - x0.

    Raises:
        ValueError: latents of another size than the configuration's, or more frames than the table of ids.

    Source: docs/method.md section 3, absolute ids.
    """
    frames, size = x.shape[1], (config.latent_rows, config.latent_columns)
    if x.shape[3:] != size:
        raise ValueError(f"latents are {tuple(x.shape[3:])}, the configuration says {size}")
    window = WindowConfig(sink_frames=0, window_frames=frames, frames_per_block=frames, relative=False)
    clip = replace(config, window=window, memory=None)
    call = Geometry(clip, x.device).call(0, frames)
    flow = model(x, model.condition(t), text, FunctionalKV(clip), call)
    assert flow is not None
    return flow
