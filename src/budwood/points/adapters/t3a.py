"""Names that lean on the clouds to be named; nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from budwood.errors import InputError
from budwood.points.adapters.adabn import AdaBN, AdaBNConfig


@dataclass(frozen=True)
class T3AConfig(AdaBNConfig):
    """Options of T3A.

    Attributes:
        n_keep: features per name at most, 0 or more.
    """

    n_keep: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_keep < 0:
            raise InputError(f"n_keep={self.n_keep} must be 0 or more")


class T3A(AdaBN):
    """Test-time adjustment of the classifier, on top of statistics of sparse clouds.

    Deviation: the paper's clouds come one by one, and each is named with those before it; here all
    that are named in one call are looked at first.
    """

    name: ClassVar[str] = "t3a"
    Config: ClassVar[type[AdaBNConfig]] = T3AConfig
    transductive: ClassVar[bool] = True
    config: T3AConfig

    def adjusted_names(self, vectors: Tensor, features: Tensor) -> Tensor:
        return adjusted_names(vectors, features, self.encoder.logit_scale, self.config.n_keep)


def adjusted_names(
    vectors: Tensor, features: Tensor, logit_scale: float, n_keep: int = 20
) -> Tensor:
    """Training-free adaptation: classifiers that lean on the surest unlabelled features.

    Source: T3A (NeurIPS 2021): the vector of a class becomes the mean of its text and of the
    ``n_keep`` features of least entropy among those that are named so.

    Args:
        vectors: of names, of length 1, shape (n_names, d).
        features: of unlabelled clouds, shape (n, d).
        logit_scale: factor on cosines.
        n_keep: features per class at most, 0 or more.

    Returns:
        Vectors of length 1, shape (n_names, d).
    """
    unit = F.normalize(features, dim=-1)
    log_p = (logit_scale * unit @ vectors.T).log_softmax(-1)
    unsure = -(log_p.exp() * log_p).sum(-1)
    named = log_p.argmax(-1)
    sums = vectors.clone()
    for index in range(len(vectors)):
        members = (named == index).nonzero().squeeze(1)
        surest = members[unsure[members].argsort(stable=True)[:n_keep]]
        sums[index] += unit[surest].sum(0)
    return F.normalize(sums, dim=-1)
