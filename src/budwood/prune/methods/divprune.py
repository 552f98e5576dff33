"""DivPrune: tokens that differ as much as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.greedy import farthest_points, unit


@dataclass(frozen=True)
class DivPrune(Method):
    """Keep tokens that differ from each other as much as possible, whatever the question.

    Each step takes ``argmax_i min_{j taken} (1 − cos_ij)``. The first token is the one farthest
    from its nearest neighbour.

    Source: DivPrune, CVPR 2025, arXiv 2503.02175, max–min diversity. Deviation: ties go to the
    lower index.
    """

    name: ClassVar[str] = "divprune"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = False
    source: ClassVar[str] = "DivPrune, CVPR 2025, arXiv 2503.02175"

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        units, unlike = self._space(visual)
        return Selection(farthest_points(units, keep, unlike))

    def _space(self, visual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens as unit rows, and a quality of each or None; Cen-Prune has another."""
        return unit(visual), None
