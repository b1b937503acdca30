"""What a clock needs beside a GPU, whose calls return before their work is done."""

from __future__ import annotations

import torch


def idle(device: str) -> None:
    """Wait until ``device`` has done all it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
