"""VisionZip: salient tokens, and means of groups of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_number
from budwood.prune.methods.base import Extras, Method, Selection
from budwood.prune.methods.greedy import cosines, unit
from budwood.prune.methods.scores import descending, evenly_spaced


@dataclass(frozen=True)
class VisionZip(Method):
    """Keep the most salient tokens, and merge all others into a few contextual ones.

    Contextual tokens are evenly spaced among what is left. Each other token joins the contextual
    one whose key resembles its own most, and each group becomes its mean.

    Source: VisionZip, CVPR 2025, arXiv 2412.04467, dominant and contextual tokens. Deviations:
    projected features are averaged, where the paper averages them before the projector; [CLS] is no
    candidate; where keys are not at hand, projected features stand in. Assumption: the contextual
    token counts in the mean like the others.

    Args:
        dominant: fraction of the budget that goes by saliency, in (0, 1]; 54 of 64 in the paper.

    Raises:
        InputError: ``dominant`` is out of range.
    """

    dominant: float = 54 / 64

    name: ClassVar[str] = "visionzip"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    source: ClassVar[str] = "VisionZip, CVPR 2025, arXiv 2412.04467"

    def __post_init__(self) -> None:
        need_number(lambda x: 0 < x <= 1, "number above 0 and up to 1", dominant=self.dominant)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
        extras: Extras | None = None,
    ) -> Selection:
        assert saliency is not None  # select() has checked
        scores = saliency.float()
        order = descending(scores)
        n_dominant = max(1, int(self.dominant * keep + 0.5))  # halves up
        n_contextual = keep - n_dominant
        left = order[n_dominant:].sort().values
        if n_contextual == 0 or keep == len(visual):
            return Selection(order[:keep], saliency=scores)

        where = evenly_spaced(len(left), n_contextual, left.device)
        keys = key_space(visual, extras)[left]
        group = cosines(keys, keys[where]).argmax(1)
        group[where] = torch.arange(n_contextual, device=left.device)
        # A product with a table of ones adds in one order, where index_add would not on a GPU.
        member = (group == torch.arange(n_contextual, device=left.device).unsqueeze(1)).float()
        means = (member @ visual[left].float()) / member.sum(1, keepdim=True)
        features = torch.cat((visual[order[:n_dominant]].float(), means))
        indices = torch.cat((order[:n_dominant], left[where]))
        return Selection(indices, saliency=scores, features=features)


def key_space(visual: Tensor, extras: Extras | None) -> Tensor:
    """Keys, mean over heads, as unit rows; projected features where there are none."""
    keys = None if extras is None else extras.keys
    return unit(visual if keys is None else keys.float().mean(1))
