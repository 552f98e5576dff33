"""Adapters that earlier versions saved still load and give the same features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from budwood.points import load_adapter, load_encoder
from budwood.points.adapters.base import encoder_name

SAVED = Path(__file__).parents[1] / "points" / "saved"
"""Adapters for the embedded encoder, and the first four features of each for three clouds."""
FEATURES = json.loads((SAVED / "features.json").read_text())


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("sprout-dense")


@pytest.mark.parametrize("name", ["vpt-deep", "vpt-shallow", "fused", "lora", "t3a"])
def test_saved_adapters(name, encoder):
    assert encoder_name(SAVED / name) == "sprout-dense"  # they were saved when it was sprout
    xyz = torch.randn(3, 32, 3, generator=torch.Generator().manual_seed(1))
    xyz = xyz / xyz.norm(dim=-1).amax(1)[:, None, None]
    with torch.inference_mode():
        frozen = encoder(xyz)[:, :4].flatten()
        adapted = load_adapter(SAVED / name, encoder)(xyz)[:, :4].flatten()
    torch.testing.assert_close(frozen, torch.tensor(FEATURES["frozen"]), rtol=0, atol=1e-3)
    torch.testing.assert_close(adapted, torch.tensor(FEATURES[name]), rtol=0, atol=1e-3)
    assert (adapted - frozen).abs().max() > 0.05
