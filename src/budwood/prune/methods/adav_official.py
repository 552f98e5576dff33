"""AdaV as its authors' code does it, faults included, for comparison with published numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_int
from budwood.errors import BudgetError, ShapeError
from budwood.prune.methods.adav import AdaV
from budwood.prune.methods.base import Method, Selection, Split
from budwood.prune.methods.scores import best_split, descending, log_relevance


@dataclass(frozen=True)
class AdaVOfficial(AdaV):
    """AdaV with the selection of its authors' code, faults included. For LLaVA and LLaVA-NeXT.

    Visual tokens come in crop order: ``n_crops`` crops of equal size, the overview first. With
    ``c = n_crops`` and ``k = floor(floor(keep / 2) / c)``, these faults are reproduced:

    - rounding per crop: ``2·k·c`` tokens are kept, fewer than ``keep`` unless 2c divides it
      (144 over 5 crops gives 140);
    - crop offset: pick i of crop j becomes token ``i + j`` and not ``i + j·n_visual/c``, so that
      every saliency pick lands in the first crop or just behind it;
    - saliency takes the best 2k of each crop, one list after the other, and its reserve is the
      front of that list: mostly the overview crop, whatever the scores of the others;
    - no union: a token that both lists pick, or onto which two picks collapse, comes twice.

    Source: the public code of AdaV, ``JiayiV/AdaV``. The fixed prompt prefix and the text that
    counts as the question lie outside the selection and are not reproduced (see ``attach``).
    Deviations: float32 scores (the published ones have the model's dtype); ties go to the lower
    index, so that it is deterministic; a question without tokens, where the published code stops,
    has flat relevance.

    Args:
        reserve: fraction of the budget that each list keeps outright, in [0, 0.5].
        temperature: factor on the cosine of text and visual tokens.
        n_crops: crops of the image; ``attach`` sets it for each image, so it is refused there.

    Raises:
        InputError: a parameter is outside its range.
        ShapeError: ``n_crops`` is below 1, or the tokens do not divide into that many crops.
        BudgetError: ``keep`` is below two tokens a crop.
    """

    n_crops: int = 1

    name: ClassVar[str] = "adav-official"
    whole_crops: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    source: ClassVar[str] = "the public code of AdaV, JiayiV/AdaV"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_int(None, n_crops=self.n_crops)
        if self.n_crops < 1:
            raise ShapeError(
                f"n_crops={self.n_crops} is below 1; give the number of crops of the image"
            )

    def for_crops(self, n_crops: int) -> Method:
        return replace(self, n_crops=n_crops)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert text is not None and saliency is not None  # select() has checked
        n_each_crop = self._per_crop(len(visual), keep)
        n_kept = n_each_crop * self.n_crops
        log_t, s = log_relevance(visual, text, self.temperature), saliency.float()

        order_t = descending(log_t)[:n_kept]
        scores, where = s.reshape(self.n_crops, -1).sort(dim=-1, descending=True, stable=True)
        front = scores[:, :n_each_crop].flatten()
        crop = torch.arange(self.n_crops, device=s.device).unsqueeze(1)
        picks_s = (where[:, :n_each_crop] + crop).flatten()

        n_reserved = math.floor(self.reserve * n_kept)
        n_free = n_kept - 2 * n_reserved
        resorted = descending(front[n_reserved:])  # only what is not reserved is ranked globally
        order_s = torch.cat((picks_s[:n_reserved], picks_s[n_reserved:][resorted]))
        rest = slice(n_reserved, n_reserved + n_free)
        by_text = best_split(log_t[order_t[rest]], front[n_reserved:][resorted][:n_free])
        by_saliency = n_free - by_text

        # The two lists give n_kept picks in all: text from the left, saliency from the right.
        position = torch.arange(n_kept, device=s.device)
        indices = torch.where(position < n_reserved + by_text, order_t, order_s.flip(0))
        split = torch.stack((torch.full_like(by_text, 2 * n_reserved), by_text, by_saliency))
        return Selection(indices, log_t.exp(), s, Split(split))

    def _per_crop(self, n_visual: int, keep: int) -> int:
        if n_visual % self.n_crops:
            raise ShapeError(
                f"{n_visual} visual tokens do not divide into n_crops={self.n_crops} equal crops; "
                f"{self.name} takes whole crops, without unpadding or newline tokens"
            )
        per_crop = 2 * (keep // 2 // self.n_crops)
        if per_crop == 0:
            raise BudgetError(
                f"keep={keep} leaves {self.name} no token per crop; "
                f"give at least {2 * self.n_crops} (2 for each of n_crops={self.n_crops})"
            )
        return per_crop
