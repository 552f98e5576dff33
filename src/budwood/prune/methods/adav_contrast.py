"""AdaV with a relevance that looks past what all words and all visual tokens share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from budwood.prune.methods.adav import AdaV
from budwood.prune.methods.base import Method
from budwood.prune.methods.scores import log_contrast
from budwood.prune.methods.vocabulary import Common


@dataclass(frozen=True)
class AdaVContrast(AdaV):
    """AdaV's reserve, split and refill, with another relevance to the text. Ours, not the paper's.

    AdaV takes the best over all words of a question, and at its temperature each word, "the" and
    "is" too, has a token that it seems to point to. Here a word counts for what it says about a
    token beyond what the whole question says about it, and means and common directions are taken
    out before cosines are computed: see :func:`budwood.prune.methods.scores.log_contrast`.

    Args:
        reserve: share of the budget that each list keeps outright, in [0, 0.5].
        temperature: factor on the contrast; lower than AdaV's, so that a word without a match
            spreads over many tokens instead of choosing one.
        common: what the LLM's words have in common. ``attach`` fills it in; without it, as in a
            bare ``select``, words are taken as they are, which points less well.

    Raises:
        InputError: a parameter is outside its range.
    """

    temperature: float = 10.0
    common: Common | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "adav-contrast"
    needs_vocabulary: ClassVar[bool] = True
    source: ClassVar[str] = "ours, after AdaV; all-but-the-top by Mu and Viswanath, ICLR 2018"

    def fitted(self, common: Common) -> Method:
        return self if self.common is not None else replace(self, common=common)

    def official(self, n_crops: int) -> Method:
        return Method.official(self, n_crops)  # nobody has published this one

    def _log_relevance(self, visual: Tensor, text: Tensor) -> Tensor:
        common = None if self.common is None else self.common.to(visual.device)
        return log_contrast(visual, text, self.temperature, common)
