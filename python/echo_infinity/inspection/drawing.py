"""Pictures of what a watcher saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from echo_infinity.config import EchoConfig, memory_grid
from echo_infinity.inspection.watch import BlockView

TIERS = ("sink", "memory", "local")
PANEL = 256  # pixels of a panel of the video
_ROWS = 6  # blocks of which the pictures with a row a block show at most


def draw_tiers(views: Sequence[BlockView], path: Path) -> None:
    """Draw attention on each tier, by layer and block, and on the memory by denoising step and block."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(4, 1, figsize=(10, 10), sharex=True)
    last = torch.stack([view.tiers[-1].mean(1) for view in views])  # (blocks, layers, 3)
    steps = torch.stack([view.tiers[..., 1].mean((1, 2)) for view in views])  # (blocks, steps)
    pictures = [(f"attention on {tier}, last step", "layer", last[:, :, i].T) for i, tier in enumerate(TIERS)]
    pictures.append(("attention on memory, mean over layers", "denoising step", steps.T))
    for ax, (title, label, picture) in zip(axes, pictures, strict=True):
        extent = (views[0].block - 0.5, views[-1].block + 0.5, len(picture) - 0.5, -0.5)
        image = ax.imshow(picture.numpy(), aspect="auto", vmin=0, cmap="viridis", extent=extent)
        figure.colorbar(image, ax=ax, pad=0.01)
        ax.set(title=title, ylabel=label)
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def draw_gates(views: Sequence[BlockView], path: Path) -> bool:
    """Draw what each memory token keeps of itself in each write; say whether there was a write with a gate."""
    written = [(view.block, view.gate) for view in views if view.gate is not None]
    if not written:
        return False
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True, height_ratios=(3, 1))
    blocks = [block for block, _ in written]
    gates = torch.stack([gate for _, gate in written])  # (writes, tokens, 3)
    extent = (blocks[0] - 0.5, blocks[-1] + 0.5, gates.shape[1] - 0.5, -0.5)
    image = axes[0].imshow(gates[..., 1].T.numpy(), aspect="auto", vmin=0, vmax=1, cmap="magma", extent=extent)
    figure.colorbar(image, ax=axes, pad=0.01)
    axes[0].set(title="share of itself that a memory token keeps in a write (median over channels)", ylabel="token")
    low, middle, high = gates.mean(1).unbind(1)
    axes[1].plot(blocks, middle.numpy(), color="black", label="median over channels, mean over tokens")
    axes[1].fill_between(blocks, low.numpy(), high.numpy(), alpha=0.25, label="10 - 90 % of channels")
    axes[1].set(xlabel="block", ylim=(0, 1))
    axes[1].legend(fontsize=8)
    _save(figure, path, tight=False)
    return True


def draw_writes(views: Sequence[BlockView], frames: Mapping[int, Tensor], config: EchoConfig, path: Path) -> bool:
    """Draw what the memory reads of evicted frames, a row a write: the frames, attention on them, token by token.

    Args:
        views: of the blocks.
        frames: a picture ``(3, H, W)`` uint8 of each latent frame.
        config: geometry.
        path: of the PNG.

    Returns:
        Whether there was a write.
    """
    some = _spread([view for view in views if view.written is not None])
    if not some:
        return False
    pyplot = _pyplot()
    count = max(len(view.evicted) for view in some)
    figure, axes = pyplot.subplots(
        len(some), count + 1, figsize=(2 * count + 4, 2.1 * len(some)), squeeze=False, width_ratios=[1] * count + [2]
    )
    for row, view in zip(axes, some, strict=True):
        assert view.written is not None
        look = view.written.mean(0)  # (tokens, Tk)
        own = look[:, -len(view.evicted) * config.tokens_per_frame :]  # a sink that writes are anchored to comes first
        heat = own.sum(0).view(len(view.evicted), *config.grid)
        for ax, frame, part in zip(row, view.evicted, heat, strict=False):
            picture = frames[frame]
            size = picture.shape[1:]
            ax.imshow(picture.permute(1, 2, 0).numpy())
            ax.imshow(_enlarge(part, size).numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=float(heat.max()))
            ax.set_title(f"frame {frame}", fontsize=8)
        for ax in row[: count + 1]:
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(f"block {view.block}", fontsize=8)
        row[-1].imshow(look.numpy(), aspect="auto", cmap="inferno", vmin=0)
        row[-1].set_title("memory token (row) x evicted token (column)", fontsize=8)
    _save(figure, path)
    return True


def draw_queries(views: Sequence[BlockView], frames: Mapping[int, Tensor], config: EchoConfig, path: Path) -> None:
    """Draw what each query of a block reads, a row a block: the frames made, then its attention on each tier."""
    pyplot = _pyplot()
    per = config.window.frames_per_block
    some = _spread(views)
    figure, axes = pyplot.subplots(len(some), 4 * per, figsize=(1.3 * 4 * per, 1.5 * len(some)), squeeze=False)
    most = torch.stack([view.maps.mean(0).amax(0) for view in some]).amax(0).tolist()
    for row, view in zip(axes, some, strict=True):
        maps = view.maps.mean(0).view(per, *config.grid, 3)
        for i in range(per):
            picture = frames[view.block * per + i]
            row[i].imshow(picture.permute(1, 2, 0).numpy())
            for tier, name in enumerate(TIERS):
                ax = row[(tier + 1) * per + i]
                ax.imshow(
                    _enlarge(maps[i, ..., tier], picture.shape[1:]).numpy(), cmap="viridis", vmin=0, vmax=most[tier]
                )
                if i == per // 2 and view is some[0]:
                    ax.set_title(f"attention on {name}, 0 to {most[tier]:.2f}", fontsize=7)
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(f"block {view.block}", fontsize=7)
    _save(figure, path)


class Panels:
    """Frames of the video: the rollout, which tier its queries read, the memory's gate, and who reads the memory.

    The second panel is red where the sink is read, green where memory is, blue where local frames are, each as the
    square root of its share, or little would show but blue; the gate is bright where a token keeps itself; the last
    panel is bright where a memory token is read. Memory frames stand side by side.

    Args:
        config: geometry.
    """

    def __init__(self, config: EchoConfig) -> None:
        self.config = config
        self._head = _titles(["the rollout", "reads sink / memory / local", "memory: keeps", "memory: is read"])
        self._gate = torch.zeros(PANEL, PANEL, 3, dtype=torch.uint8)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._head.shape[0] + PANEL, 4 * PANEL

    def frames(self, view: BlockView, video: Tensor) -> Tensor:
        """Compose the block's frames.

        Args:
            view: of the block.
            video: ``(N, H, W, 3)`` uint8 its frames.

        Returns:
            ``(N, *size, 3)`` uint8.
        """
        per = self.config.window.frames_per_block
        maps = view.maps.mean(0).view(per, *self.config.grid, 3)
        if view.gate is not None:
            self._gate = self._tokens(view.gate[:, 1], 1.0)
        reads = self._tokens(view.memory.mean(0), float(view.memory.mean(0).max())) if view.memory.numel() else None
        blank = torch.zeros(PANEL, PANEL, 3, dtype=torch.uint8)
        rows = []
        for i, frame in enumerate(video):
            tiers = (255 * maps[i * per // len(video)].sqrt()).to(torch.uint8)
            bottom = [_fit(frame), _fit(tiers), self._gate, blank if reads is None else reads]
            rows.append(torch.cat([self._head, torch.cat(bottom, 1)]))
        return torch.stack(rows)

    def _tokens(self, values: Tensor, most: float) -> Tensor:
        """A panel with a cell a memory token ``(tokens,)``, brightest at ``most``."""
        m = self.config.memory
        frames = self.config.window.frames_per_block if m is None else m.frames
        per = len(values) // frames
        grid = memory_grid(per, self.config.grid)
        spaced = nnf.pad(values[: frames * per].view(frames, *grid), (0, 1))  # a dark column after each frame
        picture = torch.cat(list(spaced), 1)[:, :-1] / max(most, 1e-9)
        return _fit((255 * picture.clamp(0, 1)).to(torch.uint8)[..., None].expand(-1, -1, 3))


def _fit(picture: Tensor) -> Tensor:
    """Enlarge ``(h, w, 3)`` uint8 by whole pixels into a panel, black around it."""
    scale = PANEL / max(picture.shape[:2])
    size = [max(1, round(scale * x)) for x in picture.shape[:2]]
    large = nnf.interpolate(picture.permute(2, 0, 1)[None].float(), size, mode="nearest")[0].to(torch.uint8)
    panel = torch.zeros(PANEL, PANEL, 3, dtype=torch.uint8)
    top, left = (PANEL - size[0]) // 2, (PANEL - size[1]) // 2
    panel[top : top + size[0], left : left + size[1]] = large.permute(1, 2, 0)
    return panel


def _titles(texts: Sequence[str]) -> Tensor:
    """A strip ``(32, 4 * PANEL, 3)`` uint8 with a title over each panel."""
    pyplot = _pyplot()
    figure = pyplot.figure(figsize=(4 * PANEL / 100, 0.32), dpi=100)
    for i, text in enumerate(texts):
        figure.text((i + 0.5) / len(texts), 0.5, text, ha="center", va="center", fontsize=9)
    figure.canvas.draw()
    strip = torch.from_numpy(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    pyplot.close(figure)
    return strip


def _enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    return nnf.interpolate(x[None, None].float(), tuple(size), mode="nearest")[0, 0]


def _spread(views: Sequence[BlockView]) -> list[BlockView]:
    """At most ``_ROWS`` of them, evenly spread."""
    if not views:
        return []
    return [views[i] for i in sorted({round(x) for x in np.linspace(0, len(views) - 1, _ROWS)})]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path, *, tight: bool = True) -> None:
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
