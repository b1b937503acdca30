"""A block that does three tiles of queries whose tail is short, tails of every tier, a query turned and not."""

import torch
from attention_cases import Case, check


def run() -> None:
    check("kernel_sm90", Case(1, 70, (193, 3, 390), 3, 64, processors=1), torch.bfloat16)
