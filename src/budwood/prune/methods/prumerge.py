"""PruMerge+: salient outliers and evenly spaced tokens, each merged with its neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_int
from budwood.prune.methods.base import Extras, Method, Selection
from budwood.prune.methods.greedy import cosines, unit
from budwood.prune.methods.scores import descending, ranks


@dataclass(frozen=True)
class PruMergePlus(Method):
    """Keep outliers of saliency and evenly spaced tokens, and merge dropped ones into them.

    A token is an outlier above ``Q3 + 1.5 · (Q3 − Q1)`` of the saliency. The most salient outliers
    are kept, and the rest of the budget goes to tokens evenly spaced among the others. Each kept
    token becomes the mean, weighted by saliency, of itself and the dropped tokens whose keys are
    nearest to its own.

    Source: LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388, token selection, supplement and the "+"
    variant. Deviations: exactly ``keep`` tokens, where the paper keeps as many as there are
    outliers; projected features are merged, where the paper merges before the projector; where keys
    are not at hand, projected features stand in. Assumptions: 32 neighbours, dropped tokens only,
    and weights that sum to 1.

    Args:
        neighbours: dropped tokens that a kept one merges with, at least 0.

    Raises:
        InputError: ``neighbours`` is out of range.
    """

    neighbours: int = 32

    name: ClassVar[str] = "prumerge-plus"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    source: ClassVar[str] = "LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388"

    def __post_init__(self) -> None:
        need_int(0, neighbours=self.neighbours)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
        extras: Extras | None = None,
    ) -> Selection:
        assert saliency is not None  # select() has checked
        scores = saliency.float()
        indices, dropped = outliers_and_even(scores, keep)
        n_neighbours = min(self.neighbours, len(dropped))
        if n_neighbours == 0:
            return Selection(indices, saliency=scores)
        keys = None if extras is None else extras.keys
        space = unit(visual if keys is None else keys.flatten(1))
        similar = cosines(space[indices], space[dropped])
        nearest = similar.argsort(dim=1, descending=True, stable=True)[:, :n_neighbours]
        weights = torch.zeros_like(similar).scatter_(1, nearest, scores[dropped][nearest])
        own = scores[indices].unsqueeze(1)
        total = own + weights.sum(1, keepdim=True)
        merged = weights @ visual[dropped].float() + own * visual[indices].float()
        features = torch.where(total > 0, merged / total, visual[indices].float())
        return Selection(indices, saliency=scores, features=features)


def outliers_and_even(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The most salient outliers, filled up with evenly spaced tokens among the others.

    Args:
        scores: saliency, float32, shape (n,).
        keep: how many to take.

    Returns:
        Kept and dropped tokens, int64, shapes (keep,) and (n − keep,).
    """
    n, ascending = len(scores), scores.sort().values
    low, high = _quantile(ascending, 0.25), _quantile(ascending, 0.75)
    outlier = scores > high + 1.5 * (high - low)
    by_saliency = outlier & (ranks(descending(scores)) < keep)
    n_needed = keep - by_saliency.sum()
    n_others = (n - by_saliency.sum()).clamp_min(1)
    # Token number q of the others is taken if an evenly spaced place falls on it: c(q) places of
    # scores.evenly_spaced lie before it, and c(q + 1) before the next.
    number = (~by_saliency).long().cumsum(0) - 1
    before = _places_before(number, n_others, n_needed)
    spaced = ~by_saliency & (_places_before(number + 1, n_others, n_needed) > before)
    first = torch.argsort((~(by_saliency | spaced)).long(), stable=True)
    return first[:keep], first[keep:]


def _places_before(q: Tensor, n: Tensor, keep: Tensor) -> Tensor:
    """How many of ``evenly_spaced(n, keep)`` are below q."""
    return torch.minimum(((2 * keep * q + n - 1) // (2 * n)).clamp_min(0), keep)


def _quantile(ascending: Tensor, q: float) -> Tensor:
    place = q * (len(ascending) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ascending) - 1)
    return torch.lerp(ascending[low], ascending[high], place - low)
