"""What ships for points, made small: sprout's weights, its text tower and the clouds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from budwood.points.data import write_clouds
from budwood.points.encoders.sprout import Sprout, SproutConfig, save_sprout
from tests.points import models, sets


def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Put small ones in place of those that ship.

    Args:
        folder: where they are written.
        monkeypatch: of the test.
        sizes: further fields of the encoder's config.
    """
    given = {"dim": 16, "depth": 2, "n_heads": 2, "embed_dim": 12, "n_groups": 8, "k": 6}
    config = SproutConfig(**given, group_width=8, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_sprout(Sprout(config), folder / "tiny.safetensors")
    for weights in ("WEIGHTS", "DENSE"):
        name = f"budwood.points.encoders.sprout.{weights}"
        monkeypatch.setattr(name, folder / "tiny.safetensors")
    monkeypatch.setattr("budwood.points.towers.MiniLM", lambda: models.Words(12))
    monkeypatch.setenv("BUDWOOD_CACHE", str(folder / "cache"))
    data = folder / "data"
    data.mkdir()
    clouds = sets.clouds()
    write_clouds(data / "all.npz", clouds.xyz, clouds.about)
    monkeypatch.setattr("budwood.points.data.FOLDER", data)
    parts = {"indoor": ("all.npz",), "road": ("all.npz",)}
    monkeypatch.setattr("budwood.points.data.PARTS", parts)
