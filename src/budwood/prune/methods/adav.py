"""AdaV: text and saliency, mixed in a proportion that each image and question decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number, need_scale
from budwood.prune.methods.base import Method, Selection, Split
from budwood.prune.methods.scores import best_split, descending, log_relevance, ranks

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class AdaV(Method):
    """Keep tokens by question and by saliency, split anew for each image and question.

    The name is short for adaptive text–visual redirection.

    With ``K = keep``, ``q = floor(reserve · K)`` and ``R = K − 2q``:

    1. the best q tokens by relevance to the text and the best q by saliency are reserved;
    2. each list, without its own reserved tokens, gives its next ``k`` (text) and ``R − k``
       (saliency) tokens, with the k that maximises the geometric mean of the two kept masses;
    3. a token in both lists counts once, and the free places are refilled with the tokens of
       largest ``max(t / Σt, s / Σs)`` among those not yet kept.

    The reported split is that of step 2. Its ``reserved`` counts both lists, and it adds up to K.

    Source: AdaV, Findings of ACL 2025 (2025.findings-acl.258); preprint AdaFV, arXiv 2501.09532.
    Deviations: step 3 (the published code feeds such a token twice), one ranking over all crops,
    ties go to the lower index, K = 1 goes to saliency, and a question without tokens means
    saliency alone. The method ``adav-official`` is the published selection.

    Args:
        reserve: fraction of the budget that each list keeps outright, in [0, 0.5].
        temperature: factor on the cosine of text and visual tokens (100 is CLIP's logit scale).

    Raises:
        InputError: a parameter is outside its range.
    """

    reserve: float = 0.25
    temperature: float = 100.0

    name: ClassVar[str] = "adav"
    needs_text: ClassVar[bool] = True
    needs_saliency: ClassVar[bool] = True
    source: ClassVar[str] = "AdaV, Findings of ACL 2025 (2025.findings-acl.258); arXiv 2501.09532"

    def __post_init__(self) -> None:
        what = "number in [0, 0.5]; the paper has 0.25"
        need_number(lambda part: 0 <= part <= 0.5, what, reserve=self.reserve)
        need_scale(temperature=self.temperature)

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
        order_s = descending(s)
        if len(text) == 0:  # relevance is flat, and its ranking would be the raster
            return Selection(order_s[:keep], log_t.exp(), s, Split((0, 0, keep)))

        order_t = descending(log_t)
        n_each = math.floor(self.reserve * keep)
        rest = slice(n_each, keep - n_each)
        by_text = best_split(log_t[order_t[rest]], s[order_s[rest]])
        by_saliency = (keep - 2 * n_each) - by_text

        picked = (ranks(order_t) < n_each + by_text) | (ranks(order_s) < n_each + by_saliency)
        # Logarithms of both lists scaled to sum to 1. log(0) = -inf comes last; the floor keeps a
        # list of zeros at -inf, and not at NaN, which would come first.
        log_s = s.log() - s.sum().clamp_min(_TINY).log()
        refill = torch.maximum(log_t - log_t.logsumexp(0), log_s)
        indices = descending(refill.masked_fill(picked, math.inf))[:keep]
        split = torch.stack((torch.full_like(by_text, 2 * n_each), by_text, by_saliency))
        return Selection(indices, log_t.exp(), s, Split(split))

    def _log_relevance(self, visual: Tensor, text: Tensor) -> Tensor:
        return log_relevance(visual, text, self.temperature)
