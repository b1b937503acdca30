"""The picture that a stream starts from."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from echo_infinity.extras import library


def load_image(path: str | os.PathLike[str], size: tuple[int, int]) -> Tensor:
    """Read a picture and fit it to a video: scaled to cover the frame, cut at the middle.

    Args:
        path: any format that Pillow reads.
        size: height and width in pixels.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        OSError: the file can't be read, or is no picture.
        MissingExtraError: Pillow is not installed.
    """
    pil, operations = library("PIL.Image", "starting from an image"), library("PIL.ImageOps", "starting from an image")
    height, width = size
    try:
        with pil.open(path) as picture:
            upright = operations.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
                upright = pil.fromarray((np.asarray(upright) // 257).astype(np.uint8))
            upright = upright.convert("RGB")
            fitted = operations.fit(upright, (width, height), method=pil.Resampling.LANCZOS)
    except Exception as error:  # a broken file can raise anything, SyntaxError for one
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise OSError(f"{path} can't be read as a picture: {error}") from error
    return torch.from_numpy(np.array(fitted))
