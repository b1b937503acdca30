"""Three tiles for two blocks: the third is shared."""

import torch
from attention_cases import Case, check


def run() -> None:
    check("kernel_sm80", Case(1, 5, (0, 100, 600), 3, 16, processors=1), torch.bfloat16)
