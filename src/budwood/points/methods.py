"""Ways to adapt an encoder to sparse clouds: an adapter, an objective and a learning rate each.

All have one interface, so that one table can compare them. The peers that train get ESP-Zero's
clouds, steps and objective, except for Tent, which has its own objective, and for ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from budwood import catalogue
from budwood.points.distill import Objective
from budwood.registry import Registry


@dataclass(frozen=True)
class Method:
    """A way to adapt.

    Attributes:
        adapter: a name in ``ADAPTERS``.
        objective: what is minimised; None: nothing is trained.
        lr: default learning rate.
        options: of the adapter.
        density_aware: whether group sizes follow the number of points; if not, the encoder's
            published sizes are used, cut to the number of points.
    """

    adapter: str
    objective: Objective | None = None
    lr: float = 1e-3
    options: Mapping[str, Any] = field(default_factory=dict)
    density_aware: bool = True

    @property
    def compares_labels(self) -> bool:
        """Whether adapting needs embeddings of labels."""
        return self.objective is not None and self.objective.compares_labels


SHARED = Objective(complementary=1.0, cosine=1.0)
"""The paper's negatives and a positive term of ours: features like those of the dense cloud."""

FEATURES = Objective(complementary=0.0, cosine=1.0)
"""The positive term alone, which needs no labels."""

_DENSITIES = (1024, 512, 256, 128, 64, 32, 16)
_BY_DENSITY = {"batch_norm": True, "counts": _DENSITIES}
_FADED = {"fade": 4.0, **_BY_DENSITY}

FROZEN = Method("frozen", density_aware=False)
TOKENS = Method("frozen")
ADABN = Method("adabn", options=_BY_DENSITY)
TENT = Method("tent", Objective(complementary=0.0, entropy=1.0), 1e-4, _BY_DENSITY)
T3A = Method("t3a", options=_BY_DENSITY)
UNI_ADAPTER = Method("uni-adapter", options=_BY_DENSITY)
POINT_CACHE = Method("point-cache", options=_BY_DENSITY)
VPT_SHALLOW = Method("vpt-shallow", SHARED, 1e-2, _BY_DENSITY)
VPT_DEEP = Method("vpt-deep", SHARED, 1e-2, _BY_DENSITY)
LORA = Method("lora", SHARED, 1e-3, _BY_DENSITY)
FULL = Method("full", SHARED, 1e-4, _BY_DENSITY)
SPARSE_LORA = Method("lora", FEATURES, 1e-3, {"stem": True, **_FADED})
SPARSE_FULL = Method("full", FEATURES, 3e-4, _FADED)
ESP_ZERO_PAPER = Method("fca", Objective(complementary=1.0), 1e-3)
ESP_ZERO = Method("fca", SHARED, 1e-3, {"init": "closed", "fade": 8.0, **_BY_DENSITY})

METHODS = Registry("method", catalogue.ADAPTATIONS)
"""Summaries and sources of the methods are in ``catalogue.ADAPTATIONS``."""
