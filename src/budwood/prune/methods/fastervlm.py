"""FasterVLM: saliency alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.prune.methods.base import Method, Selection, Split
from budwood.prune.methods.scores import descending


@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the tokens that the vision encoder's [CLS] attends to most, whatever the question.

    Source: FasterVLM, arXiv 2412.01818. Deviation: one ranking over all crops of an image, where
    the published code gives every crop an equal part of the budget.
    """

    name: ClassVar[str] = "fastervlm"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    source: ClassVar[str] = "FasterVLM, arXiv 2412.01818"

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert saliency is not None  # select() has checked
        scores = saliency.float()
        return Selection(descending(scores)[:keep], saliency=scores, split=Split((0, 0, keep)))
