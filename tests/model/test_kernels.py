"""A golden rollout with every op on its kernel: evictions, memory writes and all."""

import pytest
from test_rollout import test_rollout_matches_golden_data as assert_rollout

REFERENCES = [
    ("rope", "rope_rotate_ref"),
    ("ring", "ring_append_ref"),
    ("attention", "_merge_tiers"),
    ("norm", "modulate_ref"),
    ("norm", "gated_add_ref"),
    ("norm", "gated_modulate_ref"),
    ("memory", "_read_in_place"),
    ("gate", "gate_blend_ref"),
]


def test_rollout_by_kernels_matches_golden_data(emulated, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("an op fell back to PyTorch")

    for module, name in REFERENCES:
        monkeypatch.setattr(f"echo_ext.{module}.{name}", refuse)
    emulated.configure(race=False)  # each kernel's own tests look for races; here that would take a minute
    assert_rollout("rollout_mem_nk1")
    assert emulated.counters().launches > 1000
