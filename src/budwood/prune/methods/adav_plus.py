"""adav+: saliency and relevance times what a token adds to those kept nearby, and merging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_at_least, need_number, need_scale
from budwood.prune.methods.adav_contrast import Contrast
from budwood.prune.methods.base import Extras, Selection
from budwood.prune.methods.greedy import (
    DECIMALS,
    Coverage,
    centred,
    cosines,
    in_blocks,
    most_gaining,
    targets_of,
)
from budwood.prune.methods.scores import descending, evenly_spaced, relative


@dataclass(frozen=True)
class AdaVPlus(Contrast):
    """Keep salient or relevant tokens that show what no kept token nearby shows yet. Ours.

    AdaV and the methods of its kind keep many tokens of one object. Here the question has a say in
    the first n tokens, where n is the smaller of ``focus`` and the budget. The first
    ``floor(reserve · n)`` are the best by relevance. Then each step takes
    ``argmax_i q_i · Σ_j max(0, c_ij − best_j)``, where ``best_j`` is the largest c of token j with
    a taken one, at least 0. After the first n tokens q is the saliency alone.

    1. The relevance t is that of ``adav-contrast``. Each token gets the mean over the picture,
       weighted by ``exp(−d² / 2 blur²)``, where d is the distance of two tokens in the picture, in
       tokens of the usual size. An overview and its tiles lie over each other.
    2. ``q = (1 − w) · s / max s + w · t / max t``, where s is the saliency and w is
       ``text_weight``. A question without tokens leaves saliency alone.
    3. ``c_ij = max(0, cos_ij) · exp(−d² / 2 reach²)``, with cosines of tokens less their mean. A
       token stands only for those around it, so that another copy of an object is kept too.
    4. A dropped token j goes to the kept token i of the largest ``c_ij``, the one taken first if
       several have it, where that is above ``alike``. A kept token with features x becomes
       ``(1 − merge) · x + merge · Σ_j c_ij x_j / Σ_j c_ij`` over the tokens that go to it.

    The LLM sees each kept token at its position in the whole prompt (see
    :func:`budwood.prune.attach`). Without boxes in ``extras`` places do not count.

    Source: ours. The coverage gain is SCOPE's (arXiv 2510.24214), centring Cen-Prune's, smoothing
    EADP's; PruMerge merges dropped tokens into kept ones (arXiv 2403.15388).

    Args:
        text_weight: w, in [0, 1].
        reserve: fraction of n that goes by relevance alone, at least 0 and below 1.
        blur: in tokens, from 0.01 on.
        reach: likewise.
        focus: tokens in which the question has a say; 0 for all.
        merge: fraction of a kept token's features that comes from dropped ones, in [0, 1]; 0 merges
            nothing.
        alike: from which c on a dropped token is merged, in [0, 1].
        temperature: as in ``adav-contrast``.
        common: likewise.

    Raises:
        InputError: a parameter is outside its range.
    """

    text_weight: float = 0.5
    reserve: float = 0.125
    blur: float = 1.0
    reach: float = 3.0
    focus: int = 16
    merge: float = 0.6
    alike: float = 0.5

    name: ClassVar[str] = "adav+"
    needs_text: ClassVar[bool] = True
    needs_saliency: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    positions: ClassVar[str] = "original"
    source: ClassVar[str] = "ours, after AdaV, SCOPE, Cen-Prune, EADP and PruMerge"

    def __post_init__(self) -> None:
        shares = {"text_weight": self.text_weight, "merge": self.merge, "alike": self.alike}
        need_number(lambda w: 0 <= w <= 1, "number from 0 to 1", **shares)
        need_number(
            lambda part: 0 <= part < 1, "number from 0 to less than 1", reserve=self.reserve
        )
        need_scale(temperature=self.temperature)
        lengths = {"blur": self.blur, "reach": self.reach}
        need_number(lambda x: 0.01 <= x <= 1e6, "number from 0.01 to 1,000,000", **lengths)
        need_at_least(0, focus=self.focus)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
        extras: Extras | None = None,
    ) -> Selection:
        assert text is not None and saliency is not None  # select() has checked
        places = None
        if extras is not None and extras.boxes is not None:
            places = centres(extras.boxes).to(visual.device, non_blocking=True)
        log_t, s = self._log_relevance(visual, text), saliency.float()
        coverage = Coverage(self._covers(centred(visual), places))
        t = (log_t - log_t.max()).exp() if len(text) > 0 else None
        if t is not None and places is not None:
            t = blurred(t, places, self.blur)
        indices = self._spread(coverage, relative(s), t, keep)
        features = self._merged(visual, indices, coverage.table) if self.merge else None
        return Selection(indices, log_t.exp(), s, features=features)

    def _spread(self, coverage: Coverage, quality: Tensor, t: Tensor | None, keep: int) -> Tensor:
        """Tokens in the order in which they are taken, shape (keep,); t is None without words."""
        if t is None:
            return most_gaining(coverage, keep, quality)
        n_asked = min(keep, self.focus or keep)
        by_text = relative(t).round(decimals=DECIMALS)  # ties stay ties
        mixture = torch.lerp(quality, by_text, self.text_weight)
        best = descending(by_text)[: math.floor(self.reserve * n_asked)]
        first = most_gaining(coverage, n_asked, mixture, best)
        return first if n_asked == keep else most_gaining(coverage, keep, quality, first)

    def _merged(self, visual: Tensor, kept: Tensor, table: Tensor) -> Tensor:
        """Features of the kept tokens with dropped ones merged in, float32, shape (keep, d_model).

        Args:
            visual: all tokens, shape (n, d_model).
            kept: int64, shape (keep,).
            table: how well each token covers each target, shape (n, n_targets).
        """
        n, n_targets = table.shape
        targets = evenly_spaced(n, n_targets, kept.device)
        covers = table[kept]
        owner = covers.argmax(0)
        is_kept = torch.zeros(n, dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)
        goes = (covers.max(0).values > self.alike) & ~is_kept[targets]
        covers = covers * (owner == torch.arange(len(kept), device=kept.device)[:, None]) * goes
        total = covers.sum(1, keepdim=True)
        means = covers @ visual[targets].float() / total.clamp_min(1e-12)
        own = visual[kept].float()
        return torch.where(total > 0, torch.lerp(own, means, self.merge), own)

    def _covers(self, units: Tensor, places: Tensor | None) -> Tensor:
        """How well each token stands for each target, shape (n, n_targets)."""
        targets = targets_of(units)
        table = cosines(units, targets).clamp_min_(0.0)
        if places is not None:
            around = places[evenly_spaced(len(units), len(targets), units.device)]
            for start, rows in in_blocks(table, table.shape[1]):
                here = places[start : start + len(rows)]
                rows.mul_(closeness(here, around, self.reach).round_(decimals=DECIMALS))
        return table


def centres(boxes: Tensor) -> Tensor:
    """Centres of boxes (n, 4) in units of the median box, x and y, float32, shape (n, 2)."""
    corners, opposite = boxes[:, :2].float(), boxes[:, 2:].float()
    return (corners + opposite) / 2 / (opposite - corners).median(0).values.clamp_min(1e-6)


def closeness(places: Tensor, others: Tensor, spread: float) -> Tensor:
    """``exp(−d² / 2 spread²)`` of each pair, shape (n, n_others)."""
    across, down = (places[:, axis, None] - others[:, axis] for axis in (0, 1))
    squares = across.square_().add_(down.square_())
    return squares.div_(-2 * spread**2).exp_()


def blurred(scores: Tensor, places: Tensor, spread: float) -> Tensor:
    """Mean of scores (n,) around each place (n, 2), weighted by closeness, shape (n,)."""
    parts = []
    for _, rows in in_blocks(places, len(places)):
        weights = closeness(rows, places, spread)
        parts.append(weights @ scores / weights.sum(1))
    return torch.cat(parts)
