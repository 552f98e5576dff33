"""EADP: words that point somewhere, smoothed over the picture, and facility location."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number, need_scale
from budwood.prune.methods.base import Extras, Method, Selection
from budwood.prune.methods.greedy import (
    Coverage,
    cosines,
    minmax,
    most_gaining,
    reported,
    targets_of,
    unit,
)
from budwood.prune.methods.scores import evenly_spaced


@dataclass(frozen=True)
class EADP(Method):
    """Keep the tokens that represent those parts of the picture that the sharpest words point to.

    1. The entropy of each word is that of ``softmax(100 · cos)`` over the tokens, divided by
       ``log n``. The fraction ``words`` of lowest entropy stays. Their cosines are averaged with
       ``softmax(−entropy / 0.01)``.
    2. The mean with the cosine of the whole question is scaled to [0, 1], smoothed by a 3 × 3
       Gaussian on each raster, and raised to the power ``sharpness``: the weight w.
    3. Facility location: each step takes ``argmax_i Σ_j w_j · max(0, s_ij − best_j)``, with
       ``s = (1 + cos) / 2``.

    Source: EADP, ECCV 2026, entropy-aware dense scoring and structured selection. Deviations: the
    whole question is the mean of its embeddings, where the paper has CLIP's end-of-text; more than
    8,192 tokens are represented by an evenly spaced subset; without ``extras`` nothing is smoothed;
    a question without tokens weighs all alike. Assumptions: half of the words, a power of 2,
    normalised entropy, and the binomial kernel (1, 2, 1).

    Args:
        words: fraction of the words to keep, in (0, 1]; the paper has 0.2 to 0.5.
        sharpness: power of the weights, above 0.
        temperature: factor on the cosine before the entropy, above 0.
        word_temperature: divisor of the entropy, above 0.

    Raises:
        InputError: a parameter is out of range.
    """

    words: float = 0.5
    sharpness: float = 2.0
    temperature: float = 100.0
    word_temperature: float = 0.01

    name: ClassVar[str] = "eadp"
    needs_text: ClassVar[bool] = True
    needs_saliency: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    source: ClassVar[str] = "EADP, ECCV 2026"

    def __post_init__(self) -> None:
        need_number(lambda words: 0 < words <= 1, "number above 0 and up to 1", words=self.words)
        need_scale(
            sharpness=self.sharpness,
            temperature=self.temperature,
            word_temperature=self.word_temperature,
        )

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
        extras: Extras | None = None,
    ) -> Selection:
        assert text is not None  # select() has checked
        units = unit(visual)
        relevance = minmax(self._relevance(units, text))
        relevance = smooth(relevance, () if extras is None else extras.grids)
        targets = targets_of(units)
        weights = relevance**self.sharpness
        if len(targets) < len(units):
            weights = weights[evenly_spaced(len(units), len(targets), units.device)]
        coverage = Coverage(cosines(units, targets).add_(1).div_(2), weights)
        indices = most_gaining(coverage, keep)
        return Selection(indices, reported(relevance, text))

    def _relevance(self, units: Tensor, text: Tensor) -> Tensor:
        """Mean of the sharpest words and of the whole question, shape (n,)."""
        if len(text) == 0:
            return units.new_zeros(len(units))
        similar = cosines(unit(text), units)
        logarithms = (self.temperature * similar).log_softmax(-1)
        entropy = -(logarithms.exp() * logarithms).sum(-1) / max(math.log(len(units)), 1e-6)
        n_words = max(1, round(self.words * len(text)))
        sharpest = entropy.argsort(stable=True)[:n_words]
        share = (-entropy[sharpest] / self.word_temperature).softmax(0)
        dense = (share.unsqueeze(1) * similar[sharpest]).sum(0)
        whole = cosines(unit(text.float().mean(0, keepdim=True)), units)[0]
        return (dense + whole) / 2


def smooth(scores: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Smooth scores by a 3 × 3 Gaussian on each raster; borders repeat.

    Args:
        scores: of rasters one after the other, shape (n,).
        grids: rows and columns of each; () leaves the scores as they are.
    """
    if not grids:
        return scores
    parts = scores.split([rows * columns for rows, columns in grids])
    return torch.cat(
        [
            _blurred(_blurred(part.view(grid)).T).T.flatten()
            for part, grid in zip(parts, grids, strict=True)
        ]
    )


def _blurred(x: Tensor) -> Tensor:
    """Weights 1, 2, 1 along the first axis."""
    above, below = torch.cat((x[:1], x[:-1])), torch.cat((x[1:], x[-1:]))
    return (above + 2 * x + below) / 4
