"""One batch of streams in training: the sampler's calls, in its order, through which gradients can pass."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_infinity.cache import KV, Call, Geometry
from echo_infinity.config import EchoConfig
from echo_infinity.functional import FunctionalKV
from echo_infinity.model import CausalDiT, Conditioning
from echo_infinity.recall import Recall


class StreamPasses:
    """Streams of ``batch`` rows in step; a block is :meth:`begin`, calls of :meth:`flow` with :meth:`publish` after
    the first, and :meth:`show`.

    Args:
        model: the DiT.
        geometry: of its configuration.
        recall: what the streams keep of frames that left, or None.
        text: per layer K/V of the prompts.
    """

    def __init__(self, model: CausalDiT, geometry: Geometry, recall: Recall | None, text: list[KV]) -> None:
        self.model, self.geometry, self.recall, self.text = model, geometry, recall, text
        self.config: EchoConfig = geometry.config
        self.cache = FunctionalKV(self.config)
        self.frame = 0
        self._call: Call | None = None

    @property
    def call(self) -> Call:
        """Plan of the block in work."""
        assert self._call is not None
        return self._call

    def begin(self) -> None:
        """Plan the next block and prepare the write of the frames that it pushes out."""
        memory_frames = 0 if self.recall is None else self.recall.frames
        self._call = self.geometry.call(self.frame, self.config.window.frames_per_block, memory_frames=memory_frames)
        if self.recall is not None:
            self.recall.prepare(self.cache, self._call)

    def publish(self) -> None:
        """Make the write visible to the calls that follow."""
        if self.recall is not None:
            self.recall.publish()

    def flow(self, x: Tensor, level: Conditioning) -> Tensor:
        """Return the flow ``(B, F, C, h, w)`` float32 of a denoising call."""
        read = None if self.recall is None else self.recall.read(self.call)
        flow = self.model(x, level, self.text, self.cache, self.call, read)
        assert flow is not None
        return flow.float()

    def show(self, x: Tensor, clean: Conditioning) -> None:
        """Run the context pass on clean latents, without gradient, and go on to the next block."""
        with torch.no_grad():
            read = None if self.recall is None else self.recall.read(self.call)
            self.model(x, clean, self.text, self.cache, self.call, read, output=False)
        torch.clear_autocast_cache()  # or weights cast here, without a gradient, would serve the next call
        self.frame += self.call.frames

    @torch.no_grad()
    def switch(self, text: list[KV], latents: Tensor, clean: Conditioning) -> None:
        """Change the prompts: re-cache the window under the new text; the sink keeps its keys and values.

        Args:
            text: per layer K/V of the new prompts.
            latents: ``(B, local_frames, C, h, w)``, the last frames' clean latents.
            clean: conditioning of t = 0.

        Raises:
            ValueError: the window is not full yet.
        """
        w = self.config.window
        if self.frame < w.window_frames or latents.shape[1] != w.local_frames:
            raise ValueError(
                f"a switch in training needs a full window ({w.window_frames} frames, there are {self.frame}) and the "
                f"last {w.local_frames} frames' latents, got {latents.shape[1]}"
            )
        self.text = text
        call = self.geometry.call(self.frame - w.local_frames, w.local_frames)
        self.model(latents, clean, text, self.cache, call, None, output=False)
        torch.clear_autocast_cache()

    def detach(self) -> None:
        """Cut the history of cache and memory: the boundary of truncated back-propagation."""
        self.cache.detach()
        if self.recall is not None:
            self.recall.detach()
