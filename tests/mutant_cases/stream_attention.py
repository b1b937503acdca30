"""A query that is turned, by a table that ends where its pairs do."""

import torch
from attention_cases import Case, check


def run() -> None:
    check("kernel_sm80", Case(1, 3, (5, 0, 0), 1, 16, processors=1), torch.bfloat16)
