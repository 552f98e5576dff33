"""SCOPE: saliency times coverage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number
from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.greedy import most_covering, unit
from budwood.prune.methods.scores import relative


@dataclass(frozen=True)
class Scope(Method):
    """Keep salient tokens that resemble what no kept token resembles yet.

    Each step takes ``argmax_i s_i^α · Σ_j max(0, cos_ij − best_j)``, where s is the saliency and
    ``best_j`` the largest cosine of token j with a taken one, at first 0. The question is not read.

    Source: SCOPE, NeurIPS 2025, arXiv 2510.24214, SCOPE score. Deviation: more than 8,192 tokens
    are covered by an evenly spaced subset. Assumption: α = 1.

    Args:
        alpha: exponent of the saliency, at least 0.

    Raises:
        InputError: ``alpha`` is negative.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "scope"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    source: ClassVar[str] = "SCOPE, NeurIPS 2025, arXiv 2510.24214"

    def __post_init__(self) -> None:
        need_number(lambda alpha: 0 <= alpha <= 100, "number from 0 to 100", alpha=self.alpha)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert saliency is not None  # select() has checked
        units, unlike = self._space(visual)
        quality = relative(saliency) ** self.alpha
        if unlike is not None:
            quality = quality * unlike
        return Selection(most_covering(units, keep, quality), saliency=saliency.float())

    def _space(self, visual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens as unit rows, and a quality of each or None; Cen-Prune has another."""
        return unit(visual), None
