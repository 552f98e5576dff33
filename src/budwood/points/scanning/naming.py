"""Name clusters: batches of clusters, whatever frame they are of, through an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budwood.points.adapters import Adapter
from budwood.points.batches import encode
from budwood.points.classification import score
from budwood.points.encoders import PointEncoder
from budwood.points.encoders.base import PreparedCloud
from budwood.points.io.cloud import Cloud
from budwood.points.sampling import random_points
from budwood.points.scanning.boxes import UNKNOWN
from budwood.points.scanning.rejection import Labels

STEPS_AN_OCTAVE = 4
"""Clusters are thinned to one of this many numbers of points from n to 2n, so that batches form."""


@dataclass(frozen=True)
class Name:
    """What a cluster is; the fields are those of :class:`budwood.points.scanning.boxes.Box`."""

    label: str
    score: float
    known: float
    best: str
    n_used: int


@dataclass(frozen=True, eq=False)
class Namer:
    """Names clusters.

    Attributes:
        encoder: frozen.
        adapter: made for it, or None; one that sees each cloud alone.
        labels: those given, and those of the background.
        threshold: objects with less probability on the labels given are unknown.
        points: points of a cluster that are encoded at most; None: as many as in training.
        seed: of the sampling.
        batch_size: clusters at once.
    """

    encoder: PointEncoder
    adapter: Adapter | None
    labels: Labels
    threshold: float
    points: int | None = None
    seed: int = 0
    batch_size: int = 64

    def __call__(self, clusters: Sequence[Cloud]) -> list[Name]:
        """Name clusters of 2 points or more, z up."""
        if not clusters:
            return []
        prepared = [self._prepare(cluster) for cluster in clusters]
        features = encode(self.encoder, prepared, self.adapter, self.batch_size)
        rows = score(features, self.labels.texts.vectors, self.encoder.logit_scale).numpy()
        return [self._name(row, len(xyz)) for row, (xyz, _) in zip(rows, prepared)]

    def _prepare(self, cluster: Cloud) -> PreparedCloud:
        most = self.points or self.encoder.preparation.n_points
        rounded = batched_count(min(len(cluster), most))
        kept = cluster.take(random_points(cluster.xyz, rounded, self.seed))
        return self.encoder.prepare(kept, rounded, up="z", seed=self.seed)

    def _name(self, probabilities: np.ndarray, n_used: int) -> Name:
        given = probabilities[: self.labels.n_given]
        best, known = int(given.argmax()), float(given.sum())
        label = self.labels.given[best]
        kept = label if known >= self.threshold else UNKNOWN
        return Name(kept, float(given[best]), known, label, n_used)


def batched_count(n_points: int) -> int:
    """The largest number of the series 4, 5, 6, 7, 8, 10, 12, 14, 16, … up to ``n_points``.

    It loses a fifth of the points at most. Below 4 it is ``n_points``.
    """
    if n_points < STEPS_AN_OCTAVE:
        return n_points
    octave = 1 << (n_points.bit_length() - 1)
    step = max(1, octave // STEPS_AN_OCTAVE)
    return n_points // step * step
