"""More tokens and channels than a tile holds, widths that fill no step, gaps around every row."""

from test_gate_kernel import PAIRS, assert_blends, make


def run() -> None:
    for pair in ("bf16", "f32", "f32 state, bf16"):
        assert_blends(make((1, 131, 136), PAIRS[pair], strided=True))
