"""Text embeddings of class labels: averages over templates, a cache, and files."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from budwood.checks import need_bool, need_kind
from budwood.errors import InputError, OutputError, ShapeError, first_line
from budwood.files import cache_folder, need_parent, write_whole
from budwood.points.labels import check_labels, resolve_templates
from budwood.points.towers import TOWERS, TextTower, text_tower
from budwood.points.vocabulary import alike

if TYPE_CHECKING:
    from budwood.points.encoders.base import PointEncoder

BATCH = 256


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Class labels and their embeddings.

    Attributes:
        labels: distinct labels.
        vectors: their embeddings, of length 1, float32, shape (n_labels, d).
    """

    labels: tuple[str, ...]
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, labels: Sequence[str]) -> TextEmbeddings:
        """The embeddings of some of the labels, in the order given.

        Raises:
            InputError: there is no embedding of one of them.
        """
        missing = [label for label in labels if label not in self.labels]
        if missing:
            near = difflib.get_close_matches(missing[0], self.labels, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.labels[:8])}…"
            raise InputError(f"there is no text embedding of {missing[0]!r}; {hint}")
        rows = [self.labels.index(label) for label in labels]
        return TextEmbeddings(tuple(labels), self.vectors[rows])


def embed_labels(
    labels: Sequence[str],
    tower: str | os.PathLike[str] | TextTower = "minilm",
    templates: str | Sequence[str] = "points64",
    *,
    center: Tensor | None = None,
    cache: bool = True,
    synonyms: bool = False,
) -> TextEmbeddings:
    """Embed labels: each in every template, normalised, averaged, normalised.

    Source: CLIP's prompt ensembles, as in ULIP's evaluation.

    Args:
        labels: distinct labels.
        tower: a name in ``TOWERS``, a model's directory or a checkpoint (see
            :func:`budwood.points.towers.text_tower`), or a tower.
        templates: a name in ``TEMPLATES``, a text file with a sentence a line, or sentences; each
            has ``{}`` where the label goes.
        center: subtracted from the averages before the last normalisation, shape (d,); ours, for
            towers whose embeddings all point in similar directions, such as MiniLM.
        cache: keep the averages under ``$BUDWOOD_CACHE`` (default ``~/.cache/budwood``).
        synonyms: average over the phrasings of a label as well, as listed in
            ``budwood.points.vocabulary``: "pedestrian", "person" and "human" get one embedding.

    Raises:
        InputError: bad labels or templates, or the tower cannot be loaded.
        MissingPackageError: the tower's package is not installed.
        UnknownNameError: no such tower.
    """
    need_bool(synonyms=synonyms)
    labels = check_labels(labels)
    sentences = resolve_templates(templates)
    if isinstance(tower, (str, os.PathLike)) and tower not in TOWERS:
        tower = text_tower(tower)
    name = tower.id if isinstance(tower, TextTower) else str(tower)
    phrases = alike(labels) if synonyms else [(label,) for label in labels]
    words = [word for group in phrases for word in group]
    key = _cache_key(name, sentences, words)
    vectors = _read_cache(key, len(words)) if cache else None
    if vectors is None:
        made: TextTower = tower if isinstance(tower, TextTower) else TOWERS.get(name)()
        vectors = average_embeddings(words, made, sentences)
        if cache:
            _write_cache(key, vectors)
    each = vectors.split([len(group) for group in phrases])
    vectors = torch.stack([group.mean(dim=0) for group in each])
    if center is not None:
        vectors = vectors - center.to(vectors)
    return TextEmbeddings(labels, F.normalize(vectors, dim=-1))


def embed_labels_for(
    encoder: PointEncoder,
    labels: Sequence[str] | TextEmbeddings | None = None,
    *,
    embeddings: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | TextTower | None = None,
    templates: str | Sequence[str] = "points64",
    synonyms: bool = False,
) -> TextEmbeddings:
    """Embed labels in the space of an encoder's features.

    Args:
        encoder: whose text tower is used.
        labels: distinct labels, or embeddings of them, which are checked and returned.
        embeddings: a file written by :func:`save_embeddings`, instead of a text tower; with
            ``labels``, only those are taken from it.
        text: a text tower instead of the encoder's; as ``tower`` of :func:`embed_labels`.
        templates: as there.
        synonyms: as there.

    Raises:
        InputError: neither labels nor a file, unusable ones, or labels that the file lacks.
        ShapeError: embeddings of another width than the encoder's features.
    """
    if labels is None and embeddings is None:
        raise InputError("give labels, or a file with their embeddings")
    if embeddings is not None:
        if isinstance(labels, TextEmbeddings):
            raise InputError("give either embeddings of labels, or a file with them")
        if text is not None:
            raise InputError("give either a text model (--text), or a file of embeddings")
        result = read_embeddings(embeddings)
        if labels is not None:
            result = result.only(check_labels(labels))
    elif isinstance(labels, TextEmbeddings):
        result = labels
    else:
        assert labels is not None
        center = getattr(encoder, "text_center", None) if text is None else None
        center = center.cpu() if center is not None and center.any() else None
        result = embed_labels(
            labels, text or tower_of(encoder), templates, center=center, synonyms=synonyms
        )
    width = result.vectors.shape[1]
    if width != encoder.embed_dim:
        raise ShapeError(
            f"text embeddings are {width} wide, features of {encoder.name} {encoder.embed_dim}; "
            f"use its text tower {encoder.text!r}"
        )
    return result


def refuse_phrasing(templates: str | Sequence[str], synonyms: bool) -> None:
    """Refuse phrasings beside embeddings, which were made with their own.

    Args:
        templates: as of :func:`embed_labels`.
        synonyms: as there, by default True.

    Raises:
        InputError: they are other than the default.
    """
    unused = [f"templates={templates!r}"] if templates != "points64" else []
    unused += ["synonyms=False"] if not synonyms else []
    if unused:
        raise InputError(
            f"{unused[0]} has no effect on embeddings, which have their own phrasings; leave it "
            "out, or give labels and no embeddings"
        )


def embed_labels_without_encoder(
    name: str,
    labels: Sequence[str],
    *,
    text: str | os.PathLike[str] | TextTower | None = None,
    templates: str | Sequence[str] = "points64",
    synonyms: bool = True,
) -> TextEmbeddings:
    """Embed labels for an encoder whose weights are not loaded, or not at hand.

    Args:
        name: in ``ENCODERS``.
        labels: distinct labels.
        text: as of :func:`embed_labels_for`; ULIP's text tower is in its checkpoint, which is given
            here.
        templates: as there.
        synonyms: as there.

    Raises:
        UnknownNameError: no such encoder.
        ShapeError: the text tower is of another width.
    """
    from budwood.points.encoders import ENCODERS, load_encoder

    spec = ENCODERS.get(name)
    if spec.hub is None:
        encoder = load_encoder(name)
    else:
        with torch.device("meta"):
            encoder = spec.make()
    return embed_labels_for(encoder, labels, text=text, templates=templates, synonyms=synonyms)


def tower_of(encoder: PointEncoder) -> str | TextTower:
    """The text tower that an encoder's features are aligned with; ULIP's is in its checkpoint."""
    if encoder.text != "ulip" or encoder.checkpoint is None:
        return encoder.text
    from budwood.points.towers import ulip_text

    return ulip_text(encoder.checkpoint)


def average_embeddings(labels: Sequence[str], tower: TextTower, templates: Sequence[str]) -> Tensor:
    """Mean over the templates of normalised embeddings, shape (n_labels, d)."""
    sentences = [template.format(label) for label in labels for template in templates]
    parts = [tower.embed(sentences[i : i + BATCH]) for i in range(0, len(sentences), BATCH)]
    vectors = F.normalize(torch.cat(parts).float(), dim=-1)
    return vectors.view(len(labels), len(templates), -1).mean(dim=1)


def save_embeddings(
    embeddings: TextEmbeddings, path: str | os.PathLike[str], overwrite: bool = False
) -> None:
    """Write embeddings to a .safetensors file.

    Args:
        embeddings: of labels.
        path: the file.
        overwrite: whether a file that exists is replaced.

    Raises:
        OutputError: the file exists and ``overwrite`` is off, its folder does not exist, or it
            cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; choose another name")
    need_parent(path)
    labels = json.dumps(list(embeddings.labels), ensure_ascii=False)
    tensors = {"embeddings": embeddings.vectors.contiguous()}
    write_whole(path, lambda part: save_file(tensors, part, {"labels": labels}))


def read_embeddings(path: str | os.PathLike[str]) -> TextEmbeddings:
    """Read embeddings from a file, so that no text tower is needed.

    The file has what :func:`save_embeddings` writes: a tensor ``embeddings`` of shape
    (n_labels, d), and the labels as JSON in the metadata.

    Raises:
        InputError: no such file, or it is truncated or holds something else.
    """
    need_kind((str, os.PathLike), "file", embeddings=path)
    if not Path(path).is_file():
        raise InputError(f"text embeddings {path} do not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            vectors = file.get_tensor("embeddings").float()
        labels = json.loads(metadata["labels"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"{path} holds no text embeddings with labels: {reason}") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InputError(
            f"{path} has labels {json.dumps(labels)[:60]} in its metadata; expected a list of "
            "strings"
        )
    labels = check_labels(labels)
    if vectors.ndim != 2 or len(vectors) != len(labels):
        raise InputError(
            f"{path} has embeddings of shape {tuple(vectors.shape)} for {len(labels)} labels"
        )
    if not vectors.isfinite().all():
        raise InputError(f"{path} has NaN or infinite embeddings")
    return TextEmbeddings(labels, F.normalize(vectors, dim=-1))


def _cache_key(tower: str, templates: Sequence[str], labels: Sequence[str]) -> str:
    content = json.dumps([1, tower, list(templates), list(labels)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _cache_file(key: str) -> Path:
    return cache_folder() / "text" / f"{key}.safetensors"


def _read_cache(key: str, n_labels: int) -> Tensor | None:
    try:
        vectors = load_file(_cache_file(key))["vectors"]
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == n_labels else None


def _write_cache(key: str, vectors: Tensor) -> None:
    target = _cache_file(key)
    try:
        write_whole(target, lambda part: save_file({"vectors": vectors.contiguous()}, part))
    except OutputError:  # the answer does not depend on the cache
        return
