"""CDPruner: diversity among the tokens, given how relevant they are to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_bool
from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.greedy import greedy_map, mean_cosine, minmax, reported, unit


@dataclass(frozen=True)
class CDPruner(Method):
    """Keep the tokens that a conditional determinantal point process finds most probable.

    The kernel is ``diag(r) · cos · diag(r)``, where r is the relevance to the question scaled to
    [0, 1]. The most probable set is approximated greedily.

    Source: CDPruner, NeurIPS 2025, arXiv 2506.10967, conditional kernel and greedy MAP.
    Deviations: relevance is the mean cosine with the words in the LLM's embedding space, where the
    paper has CLIP's text encoder; a question without tokens leaves diversity alone.

    Args:
        negated: take what is least relevant as most relevant, as some published code does.
    """

    negated: bool = False

    name: ClassVar[str] = "cdpruner"
    needs_text: ClassVar[bool] = True
    needs_saliency: ClassVar[bool] = False
    source: ClassVar[str] = "CDPruner, NeurIPS 2025, arXiv 2506.10967"

    def __post_init__(self) -> None:
        need_bool(negated=self.negated)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert text is not None  # select() has checked
        relevance = mean_cosine(unit(visual), text)
        quality = minmax(-relevance if self.negated else relevance)
        units, unlike = self._space(visual)
        if unlike is not None:
            quality = quality * unlike
        return Selection(greedy_map(units, quality, keep), reported(relevance, text))

    def _space(self, visual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens as unit rows, and a quality of each or None; Cen-Prune has another."""
        return unit(visual), None
