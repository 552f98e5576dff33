"""AdaV with a relevance score without what all words and all visual tokens share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from budwood.prune.methods.adav import AdaV
from budwood.prune.methods.base import Method
from budwood.prune.methods.scores import Common, log_contrast


@dataclass(frozen=True)
class Contrast(Method):
    """Relevance without the part that all words, or all visual tokens, share.

    Args:
        temperature: factor on the contrast; lower than AdaV's, so that a word without a match
            spreads over many tokens instead of choosing one.
        common: what the LLM's words have in common. ``attach`` fills it in. Without it, as in a
            bare ``select``, words are used as they are, which works less well.
    """

    temperature: float = 10.0
    common: Common | None = field(default=None, repr=False, compare=False)

    needs_vocabulary: ClassVar[bool] = True

    def fitted(self, common: Common) -> Method:
        return self if self.common is not None else replace(self, common=common)

    def _log_relevance(self, visual: Tensor, text: Tensor) -> Tensor:
        common = None if self.common is None else self.common.to(visual.device)
        return log_contrast(visual, text, self.temperature, common)


@dataclass(frozen=True)
class AdaVContrast(Contrast, AdaV):
    """AdaV with a relevance score that ignores words like "the". Ours, not the paper's.

    AdaV takes the maximum over all words of a question. At its temperature each word, "the" and
    "is" too, points to some token. Here a word scores a token by how much more it matches than the
    whole question does, after means and common directions are removed: see
    :func:`budwood.prune.methods.scores.log_contrast`. Reserve, split and refill are AdaV's.

    Args:
        reserve: fraction of the budget that each list keeps outright, in [0, 0.5].
        temperature: as in :class:`Contrast`.
        common: likewise.

    Raises:
        InputError: a parameter is outside its range.
    """

    name: ClassVar[str] = "adav-contrast"
    source: ClassVar[str] = "ours, after AdaV; all-but-the-top by Mu and Viswanath, ICLR 2018"
