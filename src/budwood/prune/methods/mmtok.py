"""MMTok: tokens that cover the words and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number, need_scale
from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.greedy import Coverage, cosines, most_gaining, reported, targets_of, unit


@dataclass(frozen=True)
class MMTok(Method):
    """Keep the tokens that cover the words of the question and all other tokens at once.

    Two targets are stacked: ``softmax(cos(T, V) / τ_t) / m`` for m words, and
    ``α · softmax(cos(V, V) / τ_v) / n`` for n tokens, each row a softmax over the tokens to choose
    from. Each step takes the token with the largest gain over the maximum so far, summed over rows.

    Source: MMTok, ICLR 2026, arXiv 2508.18264, multimodal maximum coverage. Deviations: more than
    8,192 tokens are covered by an evenly spaced subset; a question without tokens leaves the
    picture alone.

    Args:
        text_temperature: τ_t, above 0.
        visual_temperature: τ_v, above 0; the paper has 0.2, and 0.01 on Qwen models.
        alpha: weight of the picture, at least 0.

    Raises:
        InputError: a parameter is out of range.
    """

    text_temperature: float = 0.01
    visual_temperature: float = 0.2
    alpha: float = 0.5

    name: ClassVar[str] = "mmtok"
    needs_text: ClassVar[bool] = True
    needs_saliency: ClassVar[bool] = False
    source: ClassVar[str] = "MMTok, ICLR 2026, arXiv 2508.18264"

    def __post_init__(self) -> None:
        need_scale(
            text_temperature=self.text_temperature, visual_temperature=self.visual_temperature
        )
        need_number(lambda alpha: 0 <= alpha <= 1e6, "number of at least 0", alpha=self.alpha)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert text is not None  # select() has checked
        units = unit(visual)
        # One row per token to choose from, so the softmax goes down the columns.
        words = (cosines(units, unit(text)) / self.text_temperature).softmax(0)
        picture = cosines(units, targets_of(units, len(text))).div_(self.visual_temperature)
        picture = picture.softmax(0).mul_(self.alpha / picture.shape[1])
        table = torch.cat((words / max(1, len(text)), picture), dim=1)
        del picture
        coverage = Coverage(table)
        indices = most_gaining(coverage, keep)
        relevance = words.sum(1) / max(1, len(text))
        return Selection(indices, reported(relevance, text))
