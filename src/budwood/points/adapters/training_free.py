"""Adapters that train nothing: the frozen encoder, AdaBN and T3A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.points.adapters.base import Adapter, AdapterConfig, Scorer
from budwood.points.logits import cosine_logits, entropies


class Frozen(Adapter):
    """The encoder as it is; the baseline of every comparison."""

    name: ClassVar[str] = "frozen"


@dataclass(frozen=True)
class AdaBNConfig(AdapterConfig):
    """Options of AdaBN, which always has BatchNorm statistics."""

    batch_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_norm:
            raise InputError("adabn needs batch_norm=True; for an encoder as it is, use 'frozen'")


class AdaBN(Adapter):
    """BatchNorm statistics of sparse clouds in place of the encoder's.

    Source: AdaBN (arXiv 1603.04779). :meth:`Adapter.estimate` fills them.
    """

    name: ClassVar[str] = "adabn"
    Config: ClassVar[type[AdapterConfig]] = AdaBNConfig


@dataclass(frozen=True)
class T3AConfig(AdaBNConfig):
    """Options of T3A.

    Attributes:
        n_keep: features per class at most, 0 or more.
    """

    n_keep: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(0, n_keep=self.n_keep)


class T3A(AdaBN):
    """Class embeddings move towards the clouds to be classified, on top of AdaBN.

    Source: T3A (NeurIPS 2021). Deviation: the paper sees one cloud at a time and classifies it
    with the help of earlier ones; here all clouds of a call are seen first.
    """

    name: ClassVar[str] = "t3a"
    Config: ClassVar[type[AdaBNConfig]] = T3AConfig
    sees: ClassVar[str] = "all"
    config: T3AConfig

    def scorer(self, vectors: Tensor) -> Scorer:
        scale, n_keep = self.encoder.logit_scale, self.config.n_keep

        def logits(features: Tensor) -> Tensor:
            return cosine_logits(features, t3a_text(vectors, features, scale, n_keep), scale)

        return logits


def t3a_text(vectors: Tensor, features: Tensor, logit_scale: float, n_keep: int = 20) -> Tensor:
    """Average each class embedding with its most certain unlabelled features.

    Source: T3A (NeurIPS 2021). Of the features that are closest to a class, the ``n_keep`` with the
    lowest entropy are added to its text embedding.

    Args:
        vectors: text embeddings of the classes, of length 1, shape (n_classes, d).
        features: of unlabelled clouds, shape (n_clouds, d).
        logit_scale: factor on cosines.
        n_keep: features per class at most, 0 or more.

    Returns:
        Vectors of length 1, shape (n_classes, d).
    """
    unit = F.normalize(features, dim=-1)
    logits = cosine_logits(features, vectors, logit_scale)
    entropy, predicted = entropies(logits), logits.argmax(-1)
    sums = vectors.clone()
    for index in range(len(vectors)):
        members = (predicted == index).nonzero().squeeze(1)
        most_certain = members[entropy[members].argsort(stable=True)[:n_keep]]
        sums[index] += unit[most_certain].sum(0)
    return F.normalize(sums, dim=-1)
