"""A wrapped ring with gaps between its heads, and a slot past its end."""

import torch
from test_ring import copies, make
from test_ring_kernel import assert_appended, poison_rings

from echo_ext.ring import ring_append


def run() -> None:
    assert_appended(poison_rings(make((2, 3, 2, 4, 5, 64), strided=True, rows=2)))
    args = make((1, 2, 1, 2, 3, 16))
    args["slots"] = torch.tensor([[0, 2]])
    expected = copies(args)
    ring_append(**args, backend="kernel")
    assert torch.equal(args["ring_v"][:, 1:], expected["ring_v"][:, 1:])
