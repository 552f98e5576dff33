"""Name clusters: batches of clusters, whatever frame they are of, through an encoder.

:func:`make_namer` loads what that takes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from budwood.errors import InputError, UnsupportedModelError
from budwood.notices import warn_user
from budwood.points.adapters import Adapter
from budwood.points.batches import encode
from budwood.points.classification import load_adapted, score
from budwood.points.encoders import PointEncoder
from budwood.points.encoders.base import PreparedCloud
from budwood.points.familiar import warn_unfamiliar
from budwood.points.io.cloud import Cloud
from budwood.points.sampling import random_points
from budwood.points.scanning.boxes import UNKNOWN
from budwood.points.scanning.config import ScanConfig
from budwood.points.scanning.rejection import (
    BACKGROUND,
    Labels,
    threshold_for,
    with_background,
)
from budwood.points.text import TextEmbeddings, embed_labels_for, read_embeddings
from budwood.points.towers import TextTower

NO_BACKGROUND = (
    f"no object can be {UNKNOWN!r}, since no label of the background is left; give labels, and "
    "embeddings of others too, such as wall, tree and pole"
)
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


def make_namer(
    labels: Sequence[str] | TextEmbeddings | None,
    config: ScanConfig,
    *,
    encoder: str | PointEncoder | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    adapter: str | os.PathLike[str] | Adapter | None = None,
    text: str | TextTower | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    templates: str | Sequence[str] = "short",
    synonyms: bool = True,
    background: Sequence[str] | TextEmbeddings | None = None,
    batch_size: int = 64,
) -> Namer:
    """Load what names clusters, and calibrate its threshold; arguments as of :func:`scan`."""
    model, adapter = load_adapted(encoder, checkpoint, device, adapter)
    if adapter is not None and adapter.sees != "one":
        raise UnsupportedModelError(
            f"adapter {adapter.name!r} names an object by the others of a call, and these differ "
            "from batch to batch of a scan; give one that sees each cloud alone, such as "
            "'sparse-lora'"
        )
    given = embed_labels_for(
        model, labels, embeddings=embeddings, text=text, templates=templates, synonyms=synonyms
    )
    if any(label.casefold() == UNKNOWN for label in given.labels):
        raise InputError(f"the label {UNKNOWN!r} is that of objects without a label; rename it")
    if text is None:
        warn_unfamiliar(model, given)
    stored = None if embeddings is None else read_embeddings(embeddings)
    around = _background(model, labels, background, stored, text, templates)
    known = with_background(given, around)
    expects_unknown = config.threshold or (
        config.threshold is None and not isinstance(labels, TextEmbeddings)
    )
    if expects_unknown and background is None and len(known.texts) == known.n_given:
        warn_user(NO_BACKGROUND)
    threshold = config.threshold
    if threshold is None:
        threshold = 0.0
        if around is not None and len(around) > 0:
            threshold = threshold_for(
                model, adapter, around, text=text, templates=templates, embeddings=stored
            )
    return Namer(model, adapter, known, threshold, config.points, config.seed, batch_size)


def _background(
    model: PointEncoder,
    labels: Sequence[str] | TextEmbeddings | None,
    background: Sequence[str] | TextEmbeddings | None,
    stored: TextEmbeddings | None,
    text: str | TextTower | None,
    templates: str | Sequence[str],
) -> TextEmbeddings | None:
    """Embeddings of the background, by default `BACKGROUND`, or what a file has of it.

    None beside embeddings of labels, which no text tower may fit.
    """
    if background is None and isinstance(labels, TextEmbeddings):
        return None
    if stored is None or isinstance(background, TextEmbeddings):
        wanted = BACKGROUND if background is None else background
        return embed_labels_for(model, wanted, text=text, templates=templates)
    known = [label for label in BACKGROUND if label in stored.labels]
    return stored.only(known if background is None else background)
