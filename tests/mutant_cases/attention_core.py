"""Blocks that do several tiles and share one, tails of queries and every tier, a query turned back in mid-piece."""

import torch
from attention_cases import Case, check


def run() -> None:
    check("kernel_sm80", Case(1, 130, (65, 3, 140), 3, 16, processors=1), torch.bfloat16)
    check("kernel_sm80", Case(1, 130, (40, 3, 7), 3, 16, processors=1), torch.float32)
    check("kernel_sm80", Case(1, 5, (0, 100, 600), 3, 16, processors=1), torch.float16)
