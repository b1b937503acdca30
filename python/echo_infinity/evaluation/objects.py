"""Find the objects in a picture: patches of an object colour, their place, and the shape that fits them best."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from echo_infinity.worlds import COLOUR_NAMES, object_colour
from echo_infinity.worlds.grammar import SHAPES
from echo_infinity.worlds.motion import SIZE, ObjectSpec
from echo_infinity.worlds.render import object_coverage

_LEAST_PIXELS = 40  # half of the smallest shape
_COLOUR_DISTANCE = 80.0  # from an object's colour: generated edges are softer than drawn ones
_LEAST_FIT = 0.25  # a soft edge may have another object's colour, but it is a ring
_RADII = np.arange(5.0, 12.5, 0.5)
_BLUR = 1.5  # pixels; less than the bundled codec blurs, but more takes small sharp shapes for circles


@dataclass(frozen=True)
class Found:
    """One object: what it looks like, its centre of mass ``(x, y)`` and its number of pixels.

    ``fit`` is the overlap (intersection over union) of its pixels with the best shape: near 1 for a clean object.
    """

    colour: str
    shape: str
    centre: tuple[float, float]
    pixels: int
    fit: float


def find_objects(frame: Tensor) -> list[Found]:
    """Return the objects of a frame, the largest first.

    Args:
        frame: ``(3, 64, 64)`` uint8.

    Raises:
        ValueError: another size of frame.
    """
    if frame.shape != (3, SIZE, SIZE):
        raise ValueError(f"a frame of the worlds is (3, {SIZE}, {SIZE}), got {tuple(frame.shape)}")
    index = object_colour(frame.permute(1, 2, 0), _COLOUR_DISTANCE)
    found = []
    for number in index.unique().tolist():
        if number < 0:
            continue
        large = [patch for patch in patches(index == number) if patch.sum() >= _LEAST_PIXELS]
        found += [_describe(COLOUR_NAMES[number], patch) for patch in large]
    return sorted((x for x in found if x.fit >= _LEAST_FIT), key=lambda x: -x.pixels)


def patches(mask: Tensor) -> list[Tensor]:
    """Split ``(H, W)`` bool into its connected parts (8 neighbours), each ``(H, W)`` bool."""
    # The largest number in each neighbourhood spreads until every part has one number of its own.
    label = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:
        spread = nnf.max_pool2d(label[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(spread, label):
            return [label == number for number in label.unique().tolist() if number > 0]
        label = spread


def _describe(colour: str, patch: Tensor) -> Found:
    rows, columns = patch.nonzero(as_tuple=True)
    x, y = columns.float().mean().item() + 0.5, rows.float().mean().item() + 0.5
    shape, fit = best_shape(patch)
    return Found(colour, shape, (x, y), int(patch.sum()), fit)


def best_shape(patch: Tensor) -> tuple[str, float]:
    """Return the shape that overlaps a patch ``(64, 64)`` bool most, over sizes, and that overlap.

    Shapes are tried as drawn and as a codec rounds them: blurred, and cut at half.
    """
    rows, columns = patch.nonzero(as_tuple=True)
    own = torch.zeros(2 * SIZE, 2 * SIZE)  # centred on its centre of mass, as the templates are
    own[rows - _middle(rows) + SIZE, columns - _middle(columns) + SIZE] = 1
    flat = own[SIZE // 2 : -SIZE // 2, SIZE // 2 : -SIZE // 2].flatten()
    names, masks, areas = _templates()
    common = masks @ flat
    overlap = common / (areas + flat.sum() - common)
    best = int(overlap.argmax())
    return names[best], overlap[best].item()


def _middle(places: Tensor) -> int:
    return math.floor(places.float().mean().item() + 0.5)  # round() takes halves to the even side, so now up, now down


@functools.cache
def _templates() -> tuple[list[str], Tensor, Tensor]:
    """Shapes, their masks ``(n, 64 * 64)`` float32 and the masks' areas ``(n,)``."""
    names, masks = [], []
    for shape in SHAPES:
        for radius in _RADII:
            for offset in (0.0, 0.5):  # of the centre against the pixels
                spec = ObjectSpec(colour="red", shape=shape, size="", radius=radius, place=(0, 0), velocity=(0, 0))
                drawn = object_coverage(spec, np.array([[SIZE / 2 + offset, SIZE / 2 + offset]])).dense()[0]
                for mask in (torch.from_numpy(drawn) > 0.5, _blur(torch.from_numpy(drawn)) > 0.5):
                    if not mask.any():
                        continue  # blurred away: a small cross
                    shift = [SIZE // 2 - _middle(places) for places in mask.nonzero(as_tuple=True)]
                    names.append(shape)
                    masks.append(mask.roll(shift, (0, 1)).float().flatten())
    stacked = torch.stack(masks)
    return names, stacked, stacked.sum(1)


def _blur(picture: Tensor) -> Tensor:
    """Gauss of ``_BLUR`` pixels over ``(H, W)``."""
    x = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.exp(-x.square() / (2 * _BLUR**2))
    kernel /= kernel.sum()
    return nnf.conv2d(picture[None, None], torch.outer(kernel, kernel)[None, None], padding=6)[0, 0]
