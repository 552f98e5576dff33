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
        source: the paper.
        summary: what it does, in a line.
        objective: what is minimised; None: nothing is trained.
        lr: default learning rate.
        options: of the adapter.
        density_aware: whether group sizes follow the number of points; if not, the encoder's
            published sizes are used, cut to the number of points.
    """

    adapter: str
    source: str
    summary: str
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
_ESP_ZERO = "ESP-Zero, arXiv 2404.19639 (a reconstruction)"

FROZEN = Method("frozen", "no adaptation", "the encoder as published", density_aware=False)
TOKENS = Method("frozen", "ours", "the frozen encoder with density-aware tokens")
ADABN = Method(
    "adabn", "AdaBN, arXiv 1603.04779", "BatchNorm statistics of sparse clouds", options=_BY_DENSITY
)
TENT = Method(
    "tent",
    "Tent, arXiv 2006.10726",
    "lowers the entropy of predictions by scales and shifts of the norms",
    Objective(complementary=0.0, entropy=1.0),
    1e-4,
    _BY_DENSITY,
)
T3A = Method(
    "t3a",
    "T3A, NeurIPS 2021",
    "training-free: class embeddings move towards the most certain clouds",
    options=_BY_DENSITY,
)
VPT_SHALLOW = Method(
    "vpt-shallow", "VPT, arXiv 2203.12119", "prompts before all blocks", SHARED, 1e-2, _BY_DENSITY
)
VPT_DEEP = Method(
    "vpt-deep", "VPT, arXiv 2203.12119", "prompts in each block", SHARED, 1e-2, _BY_DENSITY
)
LORA = Method("lora", "LoRA, arXiv 2106.09685", "low-rank differences", SHARED, 1e-3, _BY_DENSITY)
FULL = Method("full", "fine-tuning", "a copy of every parameter", SHARED, 1e-4, _BY_DENSITY)
SPARSE_LORA = Method(
    "lora",
    "ours, after ESP-Zero and WiSE-FT, arXiv 2109.01903",
    "low-rank differences and a copy of the layers that make tokens, trained on clouds sparser "
    "than the encoder's and faded in",
    FEATURES,
    1e-3,
    {"stem": True, **_FADED},
)
SPARSE_FULL = Method(
    "full",
    "fine-tuning, WiSE-FT, arXiv 2109.01903",
    "a copy of every parameter, trained and faded in as in sparse-lora",
    FEATURES,
    3e-4,
    _FADED,
)
ESP_ZERO_PAPER = Method(
    "fca",
    _ESP_ZERO,
    "fused cross-attention, random start, negatives alone",
    Objective(complementary=1.0),
    1e-3,
)
ESP_ZERO = Method(
    "fca",
    f"{_ESP_ZERO}, with changes of ours",
    "fused cross-attention, closed start, negatives and cosine, statistics by density",
    SHARED,
    1e-3,
    {"init": "closed", "fade": 8.0, **_BY_DENSITY},
)

METHODS = Registry("method", catalogue.ADAPTATIONS)
