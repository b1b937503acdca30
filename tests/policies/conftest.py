"""Rotation tables in float64, so that whole streams can be compared in float64."""

import pytest
import torch


@pytest.fixture
def exact_tables(monkeypatch):
    """Leave the rotation tables in float64."""
    monkeypatch.setattr("echo_ext.rope._cos_sin", lambda angles: torch.stack([angles.cos(), angles.sin()], dim=-1))
