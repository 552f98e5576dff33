"""Uni-Adapter: prototypes of each label, updated by the clouds that go by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.checks import need_at_least, need_number
from budwood.points.adapters.base import Adapter, AdapterConfig, Scorer
from budwood.points.logits import cosine_logits, entropies

MOST_STEPS = 100
"""Steps of the conjugate gradients at most, as in the paper."""
RESIDUAL = 1e-7
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class UniAdapterConfig(AdapterConfig):
    """Options of Uni-Adapter; the defaults are the paper's.

    Attributes:
        n_clusters: N, prototypes of a label at most, 1 or more.
        decay: β, how fast the weight of a cloud falls with the entropy of its prediction, 0 or
            more.
        threshold: γ, cosines of prototypes below it are no edges of the graph, in [0, 1].
        smoothing: λ, how far labels are smoothed along the graph, 0 or more.
    """

    n_clusters: int = 30
    decay: float = 10.0
    threshold: float = 0.5
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(1, n_clusters=self.n_clusters)
        need_number(
            lambda value: 0 <= value < math.inf,
            "finite number of at least 0",
            decay=self.decay,
            smoothing=self.smoothing,
        )
        need_number(lambda value: 0 <= value <= 1, "number from 0 to 1", threshold=self.threshold)


class UniAdapter(Adapter):
    """The clouds so far make prototypes of each label, which classify beside the text.

    Source: Tamjidi et al., *Adapt-As-You-Walk Through the Clouds*, AAAI 2026 (arXiv 2511.15311),
    sections "online prototyping", "prototype reassignment" and "entropy-based fusion". The paper's
    body was not at hand: its equations are known from public reviews, without their numbers. What
    they leave **open**, with our reading:

    - α of a prototype is the mean of its clouds' α, so that b·α is their sum.
    - A cloud enters the cache before it is classified.
    - The entropies are in nats. Logits of the text and of the cache are cosines times the encoder's
      ``logit_scale``.
    - Prototypes are compared at length 1, and each is its own neighbour in the graph.
    - Λ divides by the number of prototypes that a label has in the cache.

    Deviation: one system is solved for each cloud, not one for each label. The matrix is symmetric,
    so the result is the same.
    """

    name: ClassVar[str] = "uni-adapter"
    Config: ClassVar[type[AdapterConfig]] = UniAdapterConfig
    sees: ClassVar[str] = "earlier"
    config: UniAdapterConfig

    def scorer(self, vectors: Tensor) -> Scorer:
        return PrototypeCache(self.config, vectors, self.encoder.logit_scale)


class PrototypeCache:
    """Logits of clouds, one after the other; see :class:`UniAdapter`.

    The graph takes 4 · n² bytes for n prototypes.

    Args:
        config: options.
        vectors: text embeddings of the labels, of length 1, shape (n_labels, d).
        logit_scale: factor on cosines.
    """

    def __init__(self, config: UniAdapterConfig, vectors: Tensor, logit_scale: float) -> None:
        self.config, self.vectors, self.logit_scale = config, vectors, logit_scale
        self.members: list[list[int]] = [[] for _ in vectors]  # prototypes of each label
        self.n_used = 0
        self.centers = vectors.new_zeros(0, vectors.shape[1])  # c
        self.units = self.centers  # U
        self.log_weights = vectors.new_zeros(0)  # log Σα: α itself underflows
        self.labels = torch.zeros(0, dtype=torch.long, device=vectors.device)
        self.graph = vectors.new_zeros(0, 0)  # A, sparsified
        self.n_steps = n_steps(config.smoothing)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits of the next clouds.

        Args:
            features: in the order in which they come, shape (n_clouds, d).

        Returns:
            Shape (n_clouds, n_labels).
        """
        main = cosine_logits(features, self.vectors, self.logit_scale)
        uncertain = entropies(main.double())  # what decides are ratios of tiny entropies
        units = F.normalize(features, dim=-1)
        self._make_room(n_new=len(features))
        log_weights = (-self.config.decay * uncertain).to(main)
        rows = []
        for unit, label, log_weight in zip(units, main.argmax(-1).tolist(), log_weights):
            self._absorb(unit, label, log_weight)
            rows.append(self._cached(unit))
        cache = torch.stack(rows)
        weight_main, weight_cache = entropies(cache.double()) + TINY, uncertain + TINY
        share = (weight_cache / (weight_main + weight_cache)).to(main)
        return main.lerp(cache, share[:, None])

    def _make_room(self, n_new: int) -> None:
        """Lengthen all tables, so that each of the next clouds could become a prototype."""
        most = len(self.members) * self.config.n_clusters
        missing = min(self.n_used + n_new, most) - len(self.units)
        if missing <= 0:
            return
        self.centers, self.units = (
            F.pad(t, (0, 0, 0, missing)) for t in (self.centers, self.units)
        )
        self.log_weights, self.labels = (
            F.pad(t, (0, missing)) for t in (self.log_weights, self.labels)
        )
        self.graph = F.pad(self.graph, (0, missing, 0, missing))

    def _absorb(self, unit: Tensor, label: int, log_weight: Tensor) -> None:
        """A new prototype while there is room, else the confidence-weighted mean with the nearest.

        c ← (α f + b α_c c) / (α + b α_c)
        """
        rows = self.members[label]
        if len(rows) < self.config.n_clusters:
            row = self.n_used
            self.n_used += 1
            rows.append(row)
            self.labels[row], self.centers[row], self.log_weights[row] = label, unit, log_weight
        else:
            row = rows[int((self.units[rows] @ unit).argmax())]
            old = self.log_weights[row]
            self.centers[row] = self.centers[row].lerp(unit, (log_weight - old).sigmoid())
            self.log_weights[row] = torch.logaddexp(old, log_weight)
        self.units[row] = F.normalize(self.centers[row], dim=0)
        cosines = self.units @ self.units[row]
        self.graph[row] = self.graph[:, row] = cosines.where(cosines >= self.config.threshold, 0)

    def _cached(self, unit: Tensor) -> Tensor:
        """Logits of one cloud by the prototypes: Λ Z*ᵀ U f, with Z* = (I + λ L)⁻¹ Z."""
        used = self.n_used
        cosines = self.units[:used] @ unit
        smooth = smoothed(cosines, self.graph[:used, :used], self.config.smoothing, self.n_steps)
        sums = torch.zeros_like(self.vectors[:, 0]).index_add(0, self.labels[:used], smooth)
        counts = sums.new_tensor([max(1, len(rows)) for rows in self.members])
        return self.logit_scale * sums / counts


def smoothed(values: Tensor, graph: Tensor, smoothing: float, n_steps: int) -> Tensor:
    """Solve (I + λ L) x = values by conjugate gradients, L = I − D^−½ A D^−½.

    Args:
        values: of each vertex, shape (n,).
        graph: A, symmetric, not negative, shape (n, n).
        smoothing: λ, 0 or more.
        n_steps: of conjugate gradients.

    Returns:
        x, shape (n,).
    """
    degree = graph.sum(1)
    root = degree.rsqrt().where(degree > 0, 0.0)

    def apply(x: Tensor) -> Tensor:
        return x + smoothing * (x - root * (graph @ (root * x)))

    x = torch.zeros_like(values)
    residual = direction = values
    error = residual @ residual
    for _ in range(n_steps):
        image = apply(direction)
        step = error / (direction @ image).clamp(min=TINY)
        x, residual = x + step * direction, residual - step * image
        before, error = error, residual @ residual
        direction = residual + error / before.clamp(min=TINY) * direction
    return x


def n_steps(smoothing: float) -> int:
    """Steps of conjugate gradients after which :func:`smoothed` is exact to about 1e-7.

    The eigenvalues of I + λ L lie in [1, 1 + 2 λ], which bounds the error. No residual has to be
    looked at, so nothing waits for the device.
    """
    root = math.sqrt(1 + 2 * smoothing)
    shrinks = (root - 1) / (root + 1)
    if shrinks < RESIDUAL:
        return 1
    return min(MOST_STEPS, math.ceil(math.log(RESIDUAL / 2) / math.log(shrinks)))
