"""PruneSID: groups by principal components, and few duplicates within each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_scale
from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.greedy import MOST_FLOATS, cosines, unit
from budwood.prune.methods.scores import descending, evenly_spaced, ranks

_SPARE = 10
_ITERATIONS = 8
_ROUNDS = 16


@dataclass(frozen=True)
class PruneSID(Method):
    """Keep the most salient tokens of each semantic group that do not resemble each other.

    1. Tokens are the variables of a principal component analysis of ``sigmoid(V)``, with
       ``keep / components`` components. A token belongs to the component of its largest absolute
       loading.
    2. Within a group, from the most salient on, a token is suppressed if its cosine with one that
       was not is above ``keep / threshold · mean cosine``.
    3. The best of each group is kept. The rest of the budget goes to groups in proportion to the
       tokens that were not suppressed, and then to suppressed ones, by saliency.

    The small eigenproblem of step 1 makes a GPU wait once.

    Source: PruneSID, ICLR 2026, arXiv 2603.09480, PSCA and intra-group NMS; without its budget that
    depends on the picture. Deviations: components by 8 subspace iterations; chains of suppression
    longer than 16 are cut. Assumptions: loadings are not scaled by the variance, places are shared
    out by Sainte-Laguë.

    Args:
        components: tokens of the budget per component, above 0.
        threshold: divisor of the budget in the similarity threshold, above 0.

    Raises:
        InputError: a parameter is out of range.
    """

    components: float = 4.0
    threshold: float = 32.0

    name: ClassVar[str] = "prunesid"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    source: ClassVar[str] = "PruneSID, ICLR 2026, arXiv 2603.09480"

    def __post_init__(self) -> None:
        need_scale(components=self.components, threshold=self.threshold)

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
        units = unit(visual)[order]  # from here on the most salient is number 0
        n_components = min(max(1, int(keep / self.components)), *visual.shape)
        group = loadings(visual.float().sigmoid(), n_components)[order].abs().argmax(1)
        limit = keep / self.threshold * units.mean(0).square().sum()
        survives = survivors(units, group, limit)
        return Selection(order[shared_out(group, survives)[:keep]], saliency=scores)


def loadings(x: Tensor, n_components: int) -> Tensor:
    """Loadings of tokens, as variables, on their first principal components.

    Args:
        x: features, float32, shape (n, d); each token's mean is subtracted.
        n_components: at most n and d.

    Returns:
        Orthonormal columns, shape (n, n_components), the first component first.
    """
    x = (x - x.mean(1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
    n_columns = min(n_components + _SPARE, *x.shape)
    basis = x @ x[evenly_spaced(len(x), n_columns, x.device)].T
    for _ in range(_ITERATIONS):
        basis = x @ (x.T @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    inner = x.T @ basis
    vectors = torch.linalg.eigh(inner.T @ inner).eigenvectors
    return basis @ vectors[:, -n_components:].flip(1)


def survivors(units: Tensor, group: Tensor, limit: Tensor) -> Tensor:
    """Which tokens are not suppressed by a better one of their group, bool, shape (n,).

    Args:
        units: unit rows, best token first, shape (n, d).
        group: of each token, int64, shape (n,).
        limit: cosine above which a better token suppresses, shape ().
    """
    n, size = len(units), max(1, MOST_FLOATS // 4 // len(units))
    place = torch.arange(n, device=units.device)
    alike = torch.empty(n, n, dtype=torch.bool, device=units.device)  # one byte a pair
    for start in range(0, n, size):
        rows = slice(start, start + size)
        same = group[rows].unsqueeze(1) == group
        above = cosines(units[rows], units) > limit
        alike[rows] = same & above & (place < place[rows].unsqueeze(1))
    survives = torch.ones(n, dtype=torch.bool, device=units.device)
    # After round r all tokens are right that are at most r suppressions deep.
    for _ in range(min(_ROUNDS, n)):
        survives = torch.cat([~(rows & survives).any(1) for rows in alike.split(size)])
    return survives


def shared_out(group: Tensor, survives: Tensor) -> Tensor:
    """Order in which tokens are kept, int64, shape (n,).

    First the best survivor of each group, then survivors in proportion to their number in the
    group, then the suppressed ones.

    Args:
        group: of each token, best token first, int64, shape (n,).
        survives: bool, shape (n,).
    """
    n = len(group)
    # Number each group's survivors from 0: sort by group, suppressed ones last.
    key = torch.where(survives, group, n + group)
    order = key.argsort(stable=True)
    members = torch.zeros(2 * n, dtype=torch.long, device=group.device)
    members = members.scatter_add(0, key, torch.ones_like(key))
    starts = members.cumsum(0) - members
    number = ranks(order) - starts[key]
    share = (number + 0.5) / members[key]
    share = torch.where(number == 0, 0.0, share)
    return torch.where(survives, share, 2.0).argsort(stable=True)
