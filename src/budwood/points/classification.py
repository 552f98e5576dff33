"""Classify clouds with labels in words: the labels of each, ranked, with scores."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from budwood.checks import need_at_least, need_kind
from budwood.errors import InputError, UnsupportedModelError
from budwood.points.adapters import Adapter, load_adapter
from budwood.points.adapters.base import encoder_name
from budwood.points.batches import encode
from budwood.points.encoders import PointEncoder, as_encoder
from budwood.points.familiar import warn_unfamiliar
from budwood.points.inputs import (
    CloudLike,
    InputOptions,
    OnError,
    Prepared,
    is_one_cloud,
    prepare_each,
)
from budwood.points.io import Assumed
from budwood.points.logits import cosine_logits
from budwood.points.text import TextEmbeddings, embed_labels_for, refuse_phrasing
from budwood.points.towers import TextTower


@dataclass(frozen=True)
class Ranking:
    """The labels of one cloud, best first.

    Attributes:
        source: the file, or the name of the cloud.
        labels: labels, best first.
        scores: their probabilities among all labels, by the encoder's ``logit_scale``.
        n_points: points that were encoded.
        assumed: what was assumed about the file or array, and which points were left out; None for
            a cloud that was given prepared.
    """

    source: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    n_points: int
    assumed: Assumed | None = None

    @property
    def best(self) -> str:
        """The first label."""
        return self.labels[0]


@overload
def classify(
    clouds: CloudLike | Sequence[CloudLike],
    labels: Sequence[str] | TextEmbeddings | None = None,
    **options: Any,
) -> list[Ranking]: ...


@overload
def classify(
    clouds: Iterator[CloudLike],
    labels: Sequence[str] | TextEmbeddings | None = None,
    **options: Any,
) -> Iterator[Ranking]: ...


def classify(  # pyright: ignore[reportInconsistentOverload]  (above, **options stands for all)
    clouds: CloudLike | Iterable[CloudLike],
    labels: Sequence[str] | TextEmbeddings | None = None,
    *,
    encoder: str | PointEncoder | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    adapter: str | os.PathLike[str] | Adapter | None = None,
    points: int | None = None,
    sampler: str = "random",
    up: str = "auto",
    columns: str | None = None,
    box: Sequence[float] | None = None,
    invalid: str = "error",
    strays: str = "drop",
    remove_ground: bool = False,
    seed: int = 0,
    top: int | None = None,
    text: str | TextTower | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    templates: str | Sequence[str] = "points64",
    synonyms: bool = True,
    batch_size: int = 32,
    on_error: OnError | None = None,
) -> list[Ranking] | Iterator[Ranking]:
    """Classify clouds: rank the labels of each by cosine with the encoder's features.

    Like the pipelines of transformers, it returns a list for one cloud or a list of them, and an
    iterator for an iterator, such as a generator or ``iter(paths)``. The iterator reads
    ``batch_size`` clouds, yields their rankings, and goes on: memory stays bounded for any number
    of clouds. Some adapters look at other clouds of the call: Uni-Adapter and Point-Cache at those
    before a cloud, and T3A at all, which are then read before the first is labelled.

    Example::

        for ranking in classify(Path("scans").glob("*.ply"), ["chair", "table"], points=64):
            print(ranking.source, ranking.best, ranking.scores[0])

    Args:
        clouds: files, folders, :class:`Cloud` objects, or arrays or tensors of shape (n_points, 3)
            or (n_points, 6): one of them, a sequence, or an iterator.
        labels: distinct labels, or their embeddings.
        encoder: a name in ``ENCODERS``, or an encoder; default the adapter's, or ``"sprout"``.
        checkpoint: a local file for a named encoder.
        device: where a named encoder runs, such as ``"cuda"``, or ``"auto"``; default the CPU.
        adapter: a folder that an adapter was saved to, or an adapter.
        points: points to keep of each cloud, 2 or more; default all, up to as many as in the
            encoder's training, which is the most in any case.
        sampler: how they are chosen, a name in ``SAMPLERS``.
        up: the axis of the clouds that points up, in ``AXES``; ``"auto"``: by the format of the
            file, z for scans, y for meshes, arrays and text.
        columns: letters of the columns of tables and arrays, such as ``"xyz_rgb"``; default: by
            their names or values.
        box: x0, y0, z0, x1, y1, z1 in the units of the file: keep the points inside.
        invalid: ``"error"``, or ``"drop"`` to leave out points of which one or two coordinates are
            NaN or infinite. Beams without a return (rows of NaN or zeros) are always left out.
        strays: ``"drop"`` or ``"keep"``, for a few points far from all others.
        remove_ground: leave out the ground, the lowest large plane.
        seed: of sampling, 0 or more.
        top: labels to return of each cloud; default all.
        text: a text tower instead of the encoder's: a name in ``TOWERS``, a model's directory, a
            checkpoint, or a tower.
        embeddings: a file with embeddings of labels, instead of a text tower; with ``labels``, only
            those are taken from it.
        templates: a name in ``TEMPLATES``, or sentences with ``{}``.
        synonyms: average the embedding of a label over its phrasings, so that "pedestrian" and
            "person" work alike; False to reproduce published numbers.
        batch_size: clouds at once.
        on_error: called with the name of a cloud that cannot be used and the error; the cloud is
            left out. Default: raise the error.

    Warns once (:class:`InputWarning`) of labels that nothing in the encoder's training resembles.

    Returns:
        One ranking for each usable cloud, in their order.

    Raises:
        InputError: unusable labels or options, no clouds in a sequence, or an unusable cloud.
        MissingPackageError: a package for a file format or for the text tower is not installed.
        UnknownNameError: an unknown encoder, sampler or text tower.
        ShapeError: embeddings of another width than the encoder's features.
        UnsupportedModelError: an adapter or a checkpoint for another encoder.
    """
    options = InputOptions(points, sampler, up, columns, box, invalid, strays, remove_ground, seed)
    need_at_least(1, top=1 if top is None else top, batch_size=batch_size)
    if embeddings is not None or isinstance(labels, TextEmbeddings):
        refuse_phrasing(templates, synonyms)
    model, adapter = load_adapted(encoder, checkpoint, device, adapter)
    classes = embed_labels_for(
        model, labels, embeddings=embeddings, text=text, templates=templates, synonyms=synonyms
    )
    if text is None:
        warn_unfamiliar(model, classes)
    prepared = prepare_each(clouds, model, options, on_error)
    rankings = _rankings(prepared, classes, model, adapter, top, batch_size)
    if not is_one_cloud(clouds) and isinstance(clouds, Iterator):
        return rankings
    if not is_one_cloud(clouds) and isinstance(clouds, Sized) and len(clouds) == 0:
        raise InputError("there are no clouds; give at least one")
    return list(rankings)


def load_adapted(
    encoder: str | PointEncoder | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    adapter: str | os.PathLike[str] | Adapter | None = None,
) -> tuple[PointEncoder, Adapter | None]:
    """An encoder and the adapter around it; arguments and errors as of :func:`classify`."""
    need_kind((str, os.PathLike, Adapter), "folder or an adapter", adapter=adapter)
    if isinstance(adapter, (str, os.PathLike)):
        made_for = encoder_name(adapter)  # checks it before the encoder is loaded
        encoder = encoder or made_for
    elif encoder is None and adapter is not None:
        encoder = adapter.encoder
    model = as_encoder(encoder or "sprout", checkpoint, device)
    if isinstance(adapter, (str, os.PathLike)):
        return model, load_adapter(adapter, model)
    if adapter is not None and adapter.encoder is not model:
        raise UnsupportedModelError(
            f"the adapter was made around another {adapter.encoder.name} encoder; pass that encoder"
        )
    return model, adapter


def _rankings(
    clouds: Iterator[Prepared],
    classes: TextEmbeddings,
    encoder: PointEncoder,
    adapter: Adapter | None,
    top: int | None,
    batch_size: int,
) -> Iterator[Ranking]:
    """Rank the labels of prepared clouds, batch by batch."""
    scorer = None if adapter is None else adapter.scorer(classes.vectors)
    at_once = None if adapter is not None and adapter.sees == "all" else batch_size
    while batch := list(itertools.islice(clouds, at_once)):
        features = encode(encoder, [one.cloud for one in batch], adapter, batch_size)
        if scorer is None:
            probabilities = score(features, classes.vectors, encoder.logit_scale)
        else:
            probabilities = scorer(features).softmax(-1)
        for prepared, row in zip(batch, probabilities):
            order = row.argsort(descending=True, stable=True)[:top].tolist()
            labels = tuple(classes.labels[i] for i in order)
            scores, n_points = tuple(row[order].tolist()), len(prepared.cloud[0])
            yield Ranking(prepared.source, labels, scores, n_points, prepared.assumed)


def score(features: Tensor, vectors: Tensor, logit_scale: float) -> Tensor:
    """Probabilities of labels: the softmax of scaled cosines.

    Args:
        features: shape (n_clouds, d).
        vectors: text embeddings of length 1, shape (n_labels, d).
        logit_scale: factor on the cosines.

    Returns:
        Shape (n_clouds, n_labels).
    """
    return cosine_logits(features, vectors, logit_scale).softmax(dim=-1)
