"""The machine code that attention's budget allows is what its tiles need: products counted, not copied."""

import json
from pathlib import Path

import pytest

BUDGET = json.loads((Path(__file__).parents[1] / "tools/sass_budget.json").read_text())["code"]
HALF = ("simt::bf16", "simt::f16")


def budget(arch, kernel, *arguments):
    return BUDGET[arch][f"attention::{kernel}<{', '.join(map(str, arguments))}>"]


@pytest.mark.parametrize("d", [16, 64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_mma_and_copies(arch, d):
    """A warp has 32 queries against 64 keys: products of 16 x 8 x 16, operands loaded 16 x 16 at a time."""
    row_tiles, keys, threads = 2, 64, 128
    scores, values = row_tiles * keys // 8 * d // 16, row_tiles * d // 8 * keys // 16
    operands = (row_tiles + keys // 16) * d // 16 + d // 16 * keys // 16
    places = 4  # where a tile's copy is started: before the loop and in it, keys and values
    for dtype in HALF:
        counts = budget(arch, "stream_attention_fwd_kernel", dtype, d)
        assert (counts["HMMA"], counts["LDSM"]) == (scores + values, operands)
        assert counts["LDGSTS"] == places * keys * d * 2 // 16 // threads
    counts = budget(arch, "stream_attention_fwd_kernel", "float", d)
    assert "HMMA" not in counts  # float32 is never rounded to TF32
    assert counts["LDGSTS"] == places * 32 * d * 4 // 16 // threads


@pytest.mark.parametrize(("d", "keys"), [(64, 192), (128, 176)])
def test_wgmma(d, keys):
    """A warpgroup has 64 queries: scores by 16 columns, values by 16 keys, each once in the loop and once outside."""
    for dtype in HALF:
        counts = budget("sm_90a", "stream_attention_sm90_fwd_kernel", dtype, d)
        assert counts["HGMMA"] == 2 * (d // 16 + keys // 16)
        assert counts["WARPGROUP"] == 2 * 2 + 4  # an arrival a group of products; a wait for each of the two, twice
        assert counts["UTMALDG"] % (d // 64) == 0  # tiles come in panels of 64 columns
