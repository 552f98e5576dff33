"""VisPruner: salient tokens, and of the others those that have no duplicate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number
from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.greedy import closest, unit
from budwood.prune.methods.scores import descending


@dataclass(frozen=True)
class VisPruner(Method):
    """Keep some tokens by saliency, and others by removing near duplicates from the rest.

    The rest is thinned out in rounds. Each deals the tokens out in turn to two groups and removes
    those of the first group that are most similar to a token of the second, until as many are left
    as the budget has room for.

    Source: VisPruner, ICCV 2025, arXiv 2412.01818: important and diverse tokens. Assumption: a
    round removes an eighth of what is left, at least 8 tokens and never more than the first group
    has, so that rounds are few.

    Args:
        important: fraction of the budget that goes by saliency, in [0, 1].

    Raises:
        InputError: ``important`` is out of range.
    """

    important: float = 0.5

    name: ClassVar[str] = "vispruner"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    source: ClassVar[str] = "VisPruner, ICCV 2025, arXiv 2412.01818"

    def __post_init__(self) -> None:
        need_number(lambda x: 0 <= x <= 1, "number from 0 to 1", important=self.important)

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
        order = descending(scores)
        n_important = int(self.important * keep + 0.5)  # halves up
        rest = order[n_important:].sort().values
        units = unit(visual)
        while len(rest) > keep - n_important:
            rest = _thinned(units, rest, len(rest) - (keep - n_important))
        return Selection(torch.cat((order[:n_important], rest)), saliency=scores)


def _thinned(units: Tensor, rest: Tensor, n_most: int) -> Tensor:
    """One round: remove up to ``n_most`` of the tokens ``rest``, which are sorted and stay so."""
    first, second = rest[::2], rest[1::2]
    n_removed = min(max(8, len(rest) // 8), len(first), n_most)
    if len(second) == 0:
        return rest[:0]
    stay = closest(units[first], units[second]).argsort(stable=True)[: len(first) - n_removed]
    return torch.cat((first[stay], second)).sort().values
