"""Cen-Prune: similarity without what all tokens of a picture share, around other methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from budwood.prune.methods.cdpruner import CDPruner
from budwood.prune.methods.divprune import DivPrune
from budwood.prune.methods.greedy import centred, minmax, unit
from budwood.prune.methods.scope import Scope

_SOURCE = "Cen-Prune, around "


class Centred:
    """Gives a method other similarities: cosines after the mean of the tokens is subtracted.

    The quality of token i is ``g_i``, minus its mean cosine with all tokens (not centred), scaled
    to [0, 1]: how unlike the picture it is. Source: Cen-Prune, which has no parameters.
    """

    def _space(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        units = unit(visual)
        alike = (units @ units.mean(0)).round(decimals=6)
        return centred(visual), minmax(-alike)


@dataclass(frozen=True)
class CenDivPrune(Centred, DivPrune):
    """DivPrune on centred tokens, unlike ones first: ``argmax_i g_i · min_j (1 − cos_ij)``."""

    name: ClassVar[str] = "cen-divprune"
    source: ClassVar[str] = _SOURCE + DivPrune.source


@dataclass(frozen=True)
class CenCDPruner(Centred, CDPruner):
    """CDPruner on centred tokens: the kernel is ``diag(r·g) · cos · diag(r·g)``."""

    name: ClassVar[str] = "cen-cdpruner"
    source: ClassVar[str] = _SOURCE + CDPruner.source


@dataclass(frozen=True)
class CenScope(Centred, Scope):
    """SCOPE on centred tokens, its saliency times g. The paper does not try this one."""

    name: ClassVar[str] = "cen-scope"
    source: ClassVar[str] = _SOURCE + Scope.source
