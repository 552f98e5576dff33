"""Tiny encoders and a text tower without weights."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from budwood.points.encoders.openshape import OpenShape
from budwood.points.encoders.pointbert import PointBert
from budwood.points.encoders.sprout import Sprout, SproutConfig
from budwood.points.encoders.uni3d import Eva, Uni3D
from budwood.points.grouping import Grouping
from budwood.points.towers import TextTower

GROUPS = Grouping(7, 5, 40)


def pointbert():
    return PointBert(dim=24, depth=2, n_heads=3, group_dim=20, embed_dim=10, grouping=GROUPS)


def openshape(embed_dim=11, grouping=GROUPS):
    sizes = {"dim": 20, "depth": 2, "n_heads": 3, "d_head": 8, "mlp_dim": 28}
    return OpenShape(**sizes, group_dims=(6, 7, 9), embed_dim=embed_dim, grouping=grouping)


def uni3d(kind="split", fused=False):
    return Uni3D(Eva(24, 3, 2, 30, kind, fused), group_dim=18, embed_dim=9, grouping=GROUPS)


def sprout():
    return Sprout(SproutConfig(dim=16, depth=3, n_heads=4, embed_dim=12, n_groups=8, k=6))


MAKERS = {"ulip": pointbert, "openshape": openshape, "uni3d": uni3d, "sprout": sprout}


def make(name, seed=0):
    """Random weights, and BatchNorm statistics that are not those of a fresh layer.

    The means are small, or all that a ReLU behind them lets through is 0.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = MAKERS[name]()
        for key, buffer in encoder.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            elif key.endswith("running_var"):
                buffer.copy_(0.3 * torch.rand_like(buffer) + 0.05)
    return encoder.eval().requires_grad_(False)


def sparse_sprout():
    """Sprout to which the clouds of ``sets`` are sparse."""
    model = make("sprout")
    model.grouping = dataclasses.replace(model.grouping, n_dense=480)
    return model


class Words(TextTower):
    """Embeddings by a hash of the text; counts what it is asked."""

    def __init__(self, width=10):
        self.id = f"words{width}"
        self.width = width
        self.asked = 0

    def embed(self, texts):
        self.asked += len(texts)
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
            rows.append(torch.randn(self.width, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(rows) * 3
