"""Embeddings of names: templates, averages, a cache, and files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from budwood.errors import InputError, OutputError, first_line
from budwood.files import write_whole
from budwood.points.templates import resolve_templates
from budwood.points.towers import TOWERS, TextTower

BATCH = 256


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Names and where they lie.

    Attributes:
        labels: the names.
        vectors: one of length 1 each, float32, shape (n_labels, d).
    """

    labels: tuple[str, ...]
    vectors: Tensor


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels without surrounding blanks.

    Raises:
        InputError: none, an empty one, or one that comes twice (up to case and blanks).
    """
    if isinstance(labels, str):
        raise InputError(f"labels={labels!r} is one string; give a list of names")
    names = tuple(" ".join(str(label).split()) for label in labels)
    if not names:
        raise InputError("there are no labels; give at least one name")
    if "" in names:
        raise InputError(f"label {names.index('') + 1} of {len(names)} is empty")
    seen: dict[str, str] = {}
    for name in names:
        if name.casefold() in seen:
            raise InputError(f"label {name!r} is repeated; give each name once")
        seen[name.casefold()] = name
    return names


def embed_labels(
    labels: Sequence[str],
    tower: str | TextTower = "minilm",
    templates: str | Sequence[str] = "points64",
    *,
    center: Tensor | None = None,
    cache: bool = True,
) -> TextEmbeddings:
    """Embed names: each in every template, normalised, averaged, normalised.

    Source: CLIP's prompt ensembles, as in ULIP's evaluation.

    Args:
        labels: distinct names.
        tower: a name in ``TOWERS``, or a tower.
        templates: a name in ``TEMPLATES``, or sentences with ``{}``.
        center: subtracted from the averages before the last normalisation, shape (d,); ours, for
            towers whose embeddings all lean one way, such as MiniLM.
        cache: keep the averages under ``$BUDWOOD_CACHE`` (default ``~/.cache/budwood``).

    Raises:
        InputError: bad labels or templates, or the tower cannot be loaded.
        UnknownNameError: no such tower.
    """
    names = check_labels(labels)
    lines = resolve_templates(templates)
    make = TOWERS.get(tower) if isinstance(tower, str) else lambda: tower
    key = _cache_key(tower if isinstance(tower, str) else tower.id, lines, names)
    vectors = _cached(key, len(names)) if cache else None
    if vectors is None:
        vectors = average_embeddings(names, make(), lines)
        if cache:
            _keep(key, vectors)
    if center is not None:
        vectors = vectors - center.to(vectors)
    return TextEmbeddings(names, F.normalize(vectors, dim=-1))


def average_embeddings(names: Sequence[str], tower: TextTower, lines: Sequence[str]) -> Tensor:
    """Mean over the templates of normalised embeddings, shape (n_names, d)."""
    sentences = [line.format(name) for name in names for line in lines]
    parts = [tower.embed(sentences[i : i + BATCH]) for i in range(0, len(sentences), BATCH)]
    vectors = F.normalize(torch.cat(parts).float(), dim=-1)
    return vectors.view(len(names), len(lines), -1).mean(dim=1)


def save_embeddings(embeddings: TextEmbeddings, path: str | os.PathLike[str]) -> None:
    """Write embeddings to a .safetensors file; an existing one is not replaced.

    Raises:
        OutputError: it exists or cannot be written.
    """
    if Path(path).exists():
        raise OutputError(f"{path} exists; choose another name")
    labels = json.dumps(list(embeddings.labels), ensure_ascii=False)
    tensors = {"embeddings": embeddings.vectors.contiguous()}
    write_whole(Path(path), lambda part: save_file(tensors, part, {"labels": labels}))


def read_embeddings(path: str | os.PathLike[str]) -> TextEmbeddings:
    """Embeddings from a file, so that no text tower is needed.

    Reads what :func:`save_embeddings` writes: a tensor ``embeddings`` of shape (n_labels, d), and
    the labels as JSON in the metadata.

    Raises:
        InputError: no such file, truncated, or of another content.
    """
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
            f"{path} has labels {json.dumps(labels)[:60]} in its metadata; expected a list of names"
        )
    labels = check_labels(labels)
    if vectors.ndim != 2 or len(vectors) != len(labels):
        raise InputError(
            f"{path} has embeddings of shape {tuple(vectors.shape)} for {len(labels)} labels"
        )
    if not vectors.isfinite().all():
        raise InputError(f"{path} has NaN or infinite embeddings")
    return TextEmbeddings(labels, F.normalize(vectors, dim=-1))


def _cache_key(tower: str, lines: Sequence[str], names: Sequence[str]) -> str:
    content = json.dumps([1, tower, list(lines), list(names)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _cache_file(key: str) -> Path:
    root = Path(os.environ.get("BUDWOOD_CACHE", Path.home() / ".cache" / "budwood"))
    return root / "text" / f"{key}.safetensors"


def _cached(key: str, n_names: int) -> Tensor | None:
    try:
        vectors = load_file(_cache_file(key))["vectors"]
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == n_names else None


def _keep(key: str, vectors: Tensor) -> None:
    """Whole or not at all; a folder that cannot be written costs time, not the answer."""
    target = _cache_file(key)
    try:
        write_whole(target, lambda part: save_file({"vectors": vectors.contiguous()}, part))
    except OutputError:
        return
