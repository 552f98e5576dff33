"""TOPS, stage 1: relevance, coverage and diversity added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number
from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.greedy import Coverage, cosines, greedy, minmax, targets_of, unit


@dataclass(frozen=True)
class Tops(Method):
    """Keep tokens by the sum of saliency, coverage gain and distance, each scaled to [0, 1].

    The first token is the most salient. Each step then takes
    ``argmax_i minmax(r)_i + λ · minmax(c)_i + α · minmax(d)_i``, where r is the saliency,
    ``c_i = Σ_j max(0, cos_ij − best_j)``, ``d_i = 1 − best_i``, and ``best`` the largest cosine
    with a taken token, at first 0.

    Source: TOPS, arXiv 2606.27161, stage 1: the part before the LLM. Deviation: more than 8,192
    tokens are covered by an evenly spaced subset. Assumptions: λ = α = 1, of the [0.5, 1] that the
    paper names; scaling is over all tokens, taken ones included.

    Args:
        coverage: λ, weight of the coverage gain, at least 0.
        diversity: α, weight of the distance, at least 0.

    Raises:
        InputError: a weight is negative.
    """

    coverage: float = 1.0
    diversity: float = 1.0

    name: ClassVar[str] = "tops"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    source: ClassVar[str] = "TOPS (stage 1), arXiv 2606.27161"

    def __post_init__(self) -> None:
        weights = {"coverage": self.coverage, "diversity": self.diversity}
        need_number(lambda weight: 0 <= weight <= 1e6, "number of at least 0", **weights)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert saliency is not None  # select() has checked
        units, relevance = unit(visual), minmax(saliency.float())
        covered = Coverage(cosines(units, targets_of(units)))
        closest = torch.zeros_like(relevance)
        started = False

        def score() -> Tensor:
            if not started:
                return relevance
            gain, distance = minmax(covered.gains()), minmax(1 - closest)
            return relevance + self.coverage * gain + self.diversity * distance

        def add(index: Tensor) -> None:
            nonlocal closest, started
            covered.add(index)
            cosine = cosines(units, units.index_select(0, index)).squeeze(1)
            closest, started = torch.maximum(closest, cosine), True

        indices = greedy(len(units), keep, units.device, score, add)
        return Selection(indices, saliency=saliency.float())
