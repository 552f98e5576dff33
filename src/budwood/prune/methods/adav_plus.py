"""adav+: saliency and relevance in one score, times what a token adds to those already kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number, need_positive
from budwood.prune.methods.adav_contrast import Contrast
from budwood.prune.methods.base import Selection
from budwood.prune.methods.greedy import centred, most_covering
from budwood.prune.methods.scores import relative


@dataclass(frozen=True)
class AdaVPlus(Contrast):
    """Keep salient or relevant tokens that show what no kept token shows yet. Ours.

    AdaV and the methods of its kind keep many tokens of one object. Here each step takes
    ``argmax_i q_i · Σ_j max(0, cos_ij − best_j)`` with ``q = (1 − w) · s / max s + w · t / max t``:
    s is the saliency and t the relevance of ``adav-contrast``, w is ``text_weight``, cosines are
    those of tokens less their mean, and ``best_j`` is the largest of token j with a taken one, at
    first 0. A question without tokens leaves saliency alone.

    Source: ours; the coverage gain is SCOPE's (arXiv 2510.24214), centring Cen-Prune's.

    Args:
        text_weight: w, in [0, 1].
        temperature: as in ``adav-contrast``.
        common: likewise.

    Raises:
        InputError: a parameter is outside its range.
    """

    text_weight: float = 0.3

    name: ClassVar[str] = "adav+"
    needs_text: ClassVar[bool] = True
    needs_saliency: ClassVar[bool] = True
    positions: ClassVar[str] = "original"
    source: ClassVar[str] = "ours, after AdaV, SCOPE and Cen-Prune"

    def __post_init__(self) -> None:
        need_number(lambda w: 0 <= w <= 1, "number from 0 to 1", text_weight=self.text_weight)
        need_positive(temperature=self.temperature)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert text is not None and saliency is not None  # select() has checked
        log_t, s = self._log_relevance(visual, text), saliency.float()
        quality = relative(s)
        if len(text) > 0:
            by_text = (log_t - log_t.max()).exp().round(decimals=6)  # ties stay ties
            quality = torch.lerp(quality, by_text, self.text_weight)
        indices = most_covering(centred(visual), keep, quality)
        return Selection(indices, log_t.exp(), s)
