"""Naming clouds: ranked names with scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.errors import InputError, ShapeError, UnsupportedModelError
from budwood.points.adapters import Adapter, load_adapter
from budwood.points.encoders import PointEncoder, load_encoder
from budwood.points.io import Cloud, make_cloud, read
from budwood.points.text import TextEmbeddings, embed_labels, read_embeddings
from budwood.points.towers import TextTower


@dataclass(frozen=True)
class Ranking:
    """Names of one cloud, best first.

    Attributes:
        source: the file, or what the cloud was called.
        names: labels.
        scores: probabilities over all labels, by the encoder's ``logit_scale``.
        n_points: points that were encoded.
    """

    source: str
    names: tuple[str, ...]
    scores: tuple[float, ...]
    n_points: int

    @property
    def best(self) -> str:
        """The first name."""
        return self.names[0]


def classify(
    clouds: Any,
    labels: Sequence[str] | TextEmbeddings | None = None,
    *,
    encoder: str | PointEncoder = "sprout",
    checkpoint: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | Adapter | None = None,
    points: int | None = None,
    sampler: str = "random",
    up: str = "y",
    seed: int = 0,
    top: int | None = None,
    text: str | TextTower | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    templates: str | Sequence[str] = "points64",
    batch_size: int = 32,
) -> list[Ranking]:
    """Name clouds with words from a list.

    Args:
        clouds: one or a list of: a file, a :class:`Cloud`, or an array of shape (n_points, 3).
        labels: the words, distinct; or their embeddings.
        encoder: a name in ``ENCODERS``, or an encoder.
        checkpoint: a local file for a named encoder.
        adapter: a folder that an adapter was saved to, or an adapter.
        points: points to keep of each cloud; default all, up to what the encoder was trained with.
        sampler: how they are chosen, a name in ``SAMPLERS``.
        up: ``"y"`` or ``"z"``: the axis of the clouds that points up.
        seed: seed of sampling.
        top: names to return of each cloud; default all.
        text: a text tower instead of the encoder's own.
        embeddings: a file with the embeddings of the words instead of ``labels``.
        templates: a name in ``TEMPLATES``, or sentences with ``{}``.
        batch_size: clouds encoded at once; those of equally many points go together.

    Returns:
        One ranking for each cloud, in their order.

    Raises:
        InputError: unusable clouds, labels or parameters.
        UnknownNameError: an unknown encoder, sampler or text tower.
        ShapeError: embeddings of another width than the encoder's.
        UnsupportedModelError: an adapter or a checkpoint for another encoder.
    """
    _check_counts(top=top, batch_size=batch_size)
    model = load_encoder(encoder, checkpoint) if isinstance(encoder, str) else encoder
    words = embed_names(model, labels, embeddings=embeddings, text=text, templates=templates)
    if isinstance(adapter, (str, os.PathLike)):
        adapter = load_adapter(adapter, model)
    elif adapter is not None and adapter.encoder is not model:
        raise UnsupportedModelError(
            f"the adapter stands around another {adapter.encoder.name} encoder; give that one too"
        )
    prepared = [  # one by one: files as they are read need not fit into memory together
        (cloud.source, model.prepare(cloud, points, up=up, sampler=sampler, seed=seed))
        for cloud in _as_clouds(clouds)
    ]
    if not prepared:
        raise InputError("there are no clouds; give at least one")
    return rank(prepared, words, model, adapter, top=top, batch_size=batch_size)


def rank(
    clouds: Sequence[tuple[str, tuple[Tensor, Tensor | None]]],
    words: TextEmbeddings,
    model: PointEncoder,
    adapter: Adapter | None = None,
    *,
    top: int | None = None,
    batch_size: int = 32,
) -> list[Ranking]:
    """Name prepared clouds; arguments as for :func:`classify`.

    Args:
        clouds: of each, what it is called, and its xyz and rgb from :meth:`PointEncoder.prepare`.
        words: embeddings of the names.
        model: the encoder.
        adapter: made for this encoder.
        top: names to return of each cloud; default all.
        batch_size: clouds encoded at once.

    Raises:
        InputError: features that are NaN or infinite.
    """
    features = encode(model, [cloud for _, cloud in clouds], adapter, batch_size)
    vectors = words.vectors if adapter is None else adapter.adjusted_names(words.vectors, features)
    scores = score(features, vectors, model.logit_scale)
    rankings = []
    for (source, (xyz, _)), row in zip(clouds, scores):
        order = row.argsort(descending=True, stable=True)[:top].tolist()
        names = tuple(words.labels[i] for i in order)
        rankings.append(Ranking(source, names, tuple(row[order].tolist()), len(xyz)))
    return rankings


def encode(
    model: PointEncoder,
    prepared: Sequence[tuple[Tensor, Tensor | None]],
    adapter: Adapter | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Features of prepared clouds, in batches of equally many points.

    Args:
        model: the encoder.
        prepared: xyz and rgb of each, from :meth:`PointEncoder.prepare`.
        adapter: made for this encoder.
        batch_size: clouds at once.

    Returns:
        Not normalised, on the CPU, shape (n_clouds, embed_dim).

    Raises:
        InputError: some are NaN or infinite.
    """
    device = next(model.parameters()).device
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, (xyz, rgb) in enumerate(prepared):
        groups.setdefault((len(xyz), rgb is not None), []).append(i)
    features = torch.empty(len(prepared), model.embed_dim)
    run = model if adapter is None else adapter
    with torch.inference_mode():
        for (_, colored), members in groups.items():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                xyz = torch.stack([prepared[i][0] for i in part]).to(device)
                colors = [color for i in part if (color := prepared[i][1]) is not None]
                rgb = torch.stack(colors).to(device) if colored else None
                features[part] = run(xyz, rgb).float().cpu()
    if not features.isfinite().all():
        whose = model.name if adapter is None else f"{model.name} with the adapter"
        raise InputError(f"{whose} gives NaN or infinite features: its weights are damaged")
    return features


def score(features: Tensor, vectors: Tensor, logit_scale: float) -> Tensor:
    """Probabilities of names: softmax of scaled cosines.

    Args:
        features: shape (n_clouds, d).
        vectors: of length 1, shape (n_labels, d).
        logit_scale: factor on the cosines.

    Returns:
        Shape (n_clouds, n_labels).
    """
    return (logit_scale * F.normalize(features, dim=-1) @ vectors.to(features).T).softmax(dim=-1)


def embed_names(
    model: PointEncoder,
    labels: Sequence[str] | TextEmbeddings | None,
    *,
    embeddings: str | os.PathLike[str] | None = None,
    text: str | TextTower | None = None,
    templates: str | Sequence[str] = "points64",
) -> TextEmbeddings:
    """Names in the space of an encoder; arguments as for :func:`classify`.

    Raises:
        InputError: neither labels nor a file, both, or unusable ones.
        ShapeError: embeddings of another width than the encoder's features.
    """
    if (labels is None) == (embeddings is None):
        raise InputError("give either labels or a file with their embeddings")
    if embeddings is not None:
        words = read_embeddings(embeddings)
    elif isinstance(labels, TextEmbeddings):
        words = labels
    else:
        assert labels is not None
        center = getattr(model, "text_center", None) if text is None else None
        center = center.cpu() if center is not None and center.any() else None
        words = embed_labels(labels, text or tower_of(model), templates, center=center)
    if words.vectors.shape[1] != model.embed_dim:
        raise ShapeError(
            f"text embeddings are {words.vectors.shape[1]} wide, features of {model.name} "
            f"{model.embed_dim}; use its own text tower {model.text!r}"
        )
    return words


def tower_of(model: PointEncoder) -> str | TextTower:
    """The text tower that an encoder's features are aligned with: ULIP's is in its checkpoint."""
    if model.text != "ulip" or model.checkpoint is None:
        return model.text
    from budwood.points.towers import ulip_text

    return ulip_text(model.checkpoint)


def _as_clouds(clouds: Any) -> Iterator[Cloud]:
    if isinstance(clouds, (str, os.PathLike, Cloud)) or getattr(clouds, "ndim", 0) == 2:
        clouds = [clouds]
    for i, item in enumerate(clouds):
        if isinstance(item, Cloud):
            yield item
        elif isinstance(item, (str, os.PathLike)):
            yield read(Path(item))
        else:
            array = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
            yield make_cloud(array, source=f"cloud {i + 1}")


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be 1 or more")
