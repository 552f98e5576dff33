"""Point-Cache: the surest clouds so far, as wholes and in parts, vote for their labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.checks import need_at_least, need_number
from budwood.points.adapters.base import Adapter, AdapterConfig, Scorer
from budwood.points.encoders.base import PointEncoder
from budwood.points.encoders.blocks import Block
from budwood.points.logits import cosine_logits, entropies

K_MEANS_STEPS = 10
CHUNK = 256
"""Clouds that are compared with the cache at once."""


@dataclass(frozen=True)
class PointCacheConfig(AdapterConfig):
    """Options of Point-Cache; the defaults are the paper's.

    Attributes:
        n_keep: K, clouds of a label in the cache at most, 1 or more.
        n_parts: m, parts of a cloud, 1 or more.
        alpha_global: weight of the votes of whole clouds, 0 or more.
        alpha_local: the same of parts.
        beta_global: how sharply votes of whole clouds fall with distance, 0 or more.
        beta_local: the same of parts.
    """

    n_keep: int = 3
    n_parts: int = 3
    alpha_global: float = 4.0
    alpha_local: float = 4.0
    beta_global: float = 3.0
    beta_local: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(1, n_keep=self.n_keep, n_parts=self.n_parts)
        need_number(
            lambda value: 0 <= value < math.inf,
            "finite number of at least 0",
            alpha_global=self.alpha_global,
            alpha_local=self.alpha_local,
            beta_global=self.beta_global,
            beta_local=self.beta_local,
        )


class PointCache(Adapter):
    """The most certain clouds so far vote for their labels, as a whole and in parts.

    Source: Sun et al., *Point-Cache*, CVPR 2025 (arXiv 2503.12150): the global cache, the local
    cache and their update. The paper's body was not at hand: it is known from its abstract and
    public reviews, which give the parameters and no equation numbers. Votes are Tip-Adapter's
    (arXiv 2111.03930), α · exp(−β (1 − cosine)), as in TDA (arXiv 2403.18293). What is **open**,
    with our reading:

    - A cloud enters the cache before it is classified, while its label has fewer than K clouds or
      in place of the least certain one, if it is more certain.
    - Parts are means of k-means over the tokens of the last block, without [CLS]. K-means starts
      from tokens far from each other and takes 10 steps.
    - The vote of a cloud's parts is the mean over all pairs of parts, so that it has the range of a
      whole cloud's vote.
    """

    name: ClassVar[str] = "point-cache"
    Config: ClassVar[type[AdapterConfig]] = PointCacheConfig
    sees: ClassVar[str] = "earlier"
    config: PointCacheConfig

    @property
    def width(self) -> int:
        return self.encoder.embed_dim + self.config.n_parts * self.encoder.dim

    def describe(self, xyz: Tensor, rgb: Tensor | None = None) -> Tensor:
        last, tokens = len(self.encoder.blocks) - 1, []

        def around(index: int, block: Block, x: Tensor) -> Tensor:
            x = block(x)
            if index == last:
                tokens.append(x[:, 1:])
            return x

        features = self.encoded(xyz, rgb, self.strength(xyz.shape[1]), around)
        return torch.cat([features, part_means(tokens[0], self.config.n_parts).flatten(1)], dim=1)

    def scorer(self, vectors: Tensor) -> Scorer:
        return HierarchicalCache(self.config, vectors, self.encoder)


class HierarchicalCache:
    """Logits of clouds, one after the other; see :class:`PointCache`.

    Args:
        config: options.
        vectors: text embeddings of the labels, of length 1, shape (n_labels, d).
        encoder: whose widths and ``logit_scale`` are used.
    """

    def __init__(self, config: PointCacheConfig, vectors: Tensor, encoder: PointEncoder) -> None:
        self.config, self.vectors, self.logit_scale = config, vectors, encoder.logit_scale
        self.wholes = vectors.new_zeros(0, encoder.embed_dim)
        self.parts = vectors.new_zeros(0, config.n_parts, encoder.dim)
        self.labels: list[int] = []
        self.entropies: list[float] = []

    def __call__(self, described: Tensor) -> Tensor:
        """Logits of the next clouds.

        Args:
            described: from :meth:`PointCache.describe`, in the order in which they come, shape
                (n_clouds, embed_dim + n_parts · dim).

        Returns:
            Shape (n_clouds, n_labels).
        """
        return torch.cat([self._next(chunk) for chunk in described.split(CHUNK)])

    def _next(self, described: Tensor) -> Tensor:
        features = described[:, : self.wholes.shape[1]]
        parts = described[:, self.wholes.shape[1] :].unflatten(1, self.parts.shape[1:])
        wholes, parts = F.normalize(features, dim=-1), F.normalize(parts, dim=-1)
        main = cosine_logits(features, self.vectors, self.logit_scale)
        n_held = len(self.labels)
        self.labels += main.argmax(-1).tolist()
        self.entropies += entropies(main).tolist()
        self.wholes = torch.cat([self.wholes, wholes])
        self.parts = torch.cat([self.parts, parts])
        held = torch.from_numpy(self._held(n_held)).to(main)
        labels = torch.tensor(self.labels, device=main.device)
        votes = (held * self._votes(wholes, parts)) @ F.one_hot(labels, main.shape[1]).to(main)
        self._keep(held[-1].nonzero().squeeze(1).tolist())
        return main + votes

    def _held(self, n_held: int) -> np.ndarray:
        """Which clouds each new one meets in the cache, itself too, (n_new, n_held + n_new)."""
        by_label: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels[:n_held]):
            by_label.setdefault(label, []).append(index)
        now = np.arange(len(self.labels)) < n_held
        rows = []
        for index in range(n_held, len(self.labels)):
            kept = by_label.setdefault(self.labels[index], [])
            kept.append(index)
            now[index] = True
            if len(kept) > self.config.n_keep:
                worst = max(kept, key=lambda i: (self.entropies[i], i))
                kept.remove(worst)
                now[worst] = False
            rows.append(now.copy())
        return np.stack(rows)

    def _votes(self, wholes: Tensor, parts: Tensor) -> Tensor:
        """What each cloud in the cache has to say to each new one, (n_new, n_held + n_new)."""
        config = self.config
        votes = config.alpha_global * (config.beta_global * (wholes @ self.wholes.T - 1)).exp()
        cosines = torch.einsum("apd,bqd->abpq", parts, self.parts)
        by_part = (config.beta_local * (cosines - 1)).exp().mean((2, 3))
        return votes + config.alpha_local * by_part

    def _keep(self, rows: list[int]) -> None:
        self.wholes, self.parts = self.wholes[rows], self.parts[rows]
        self.labels = [self.labels[i] for i in rows]
        self.entropies = [self.entropies[i] for i in rows]


def part_means(tokens: Tensor, n_parts: int, n_steps: int = K_MEANS_STEPS) -> Tensor:
    """Means of the clusters that k-means finds among the tokens of each cloud.

    It starts with the token farthest from the mean, then the one farthest from those chosen, and so
    on. A cluster that loses all tokens stays where it is. Clouds of fewer tokens than parts have
    some parts more than once.

    Args:
        tokens: shape (batch, n_tokens, dim).
        n_parts: clusters of each cloud.
        n_steps: of k-means.

    Returns:
        Shape (batch, n_parts, dim).
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    gaps = (tokens - tokens.mean(1, keepdim=True)).square().sum(-1)
    means = tokens[rows, gaps.argmax(1)][:, None]
    while means.shape[1] < n_parts:
        gaps = torch.cdist(tokens, means).amin(-1)
        means = torch.cat([means, tokens[rows, gaps.argmax(1)][:, None]], dim=1)
    for _ in range(n_steps):
        nearest = F.one_hot(torch.cdist(tokens, means).argmin(-1), n_parts).to(tokens)
        counts = nearest.sum(1)[..., None]
        sums = nearest.transpose(1, 2) @ tokens
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return means
