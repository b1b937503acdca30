"""Pictures as PNG files, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor


def write_png(path: Path, picture: Tensor) -> None:
    """Write ``(3, H, W)`` uint8 as a PNG; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = picture.shape[2], picture.shape[1], "rgb24"
    encoder.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)


def read_png(path: Path) -> Tensor:
    """Return a picture ``(3, H, W)`` uint8."""
    with av.open(str(path)) as container:
        return torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24")).permute(2, 0, 1)


def contact_sheet(rows: Sequence[Sequence[Tensor]], gap: int = 2) -> Tensor:
    """Lay frames ``(3, h, w)`` uint8 of one size out on white, ``(3, H, W)``; rows may be of different lengths."""
    _, height, width = rows[0][0].shape
    columns = max(len(row) for row in rows)
    sheet = torch.full((3, len(rows) * (height + gap), columns * (width + gap)), 255, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for c, frame in enumerate(row):
            y, x = r * (height + gap), c * (width + gap)
            sheet[:, y : y + height, x : x + width] = frame
    return sheet
