"""What an encoder was trained to name, and labels that nothing there resembles."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from budwood.checks import need_kind
from budwood.files import write_whole
from budwood.notices import warn_user
from budwood.points.encoders.base import PointEncoder
from budwood.points.label_file import names_in
from budwood.points.text import TextEmbeddings, read_embeddings

FAMILIAR = 0.5
"""Least cosine of a label with one from training, so that it is understood as that one.

Measured on sprout's test clouds: a class is called by another word of training, among the names of
all others, and its recall is divided by that under its own name. The mean is 0.31 where the cosine
of the two is 0.5 or more (40 pairs), 0.07 from 0.3 to 0.5 (101 pairs), and 0.005 below.
"""


@dataclass(frozen=True)
class Unfamiliar:
    """A label that resembles none from training.

    Attributes:
        label: as given.
        nearest: the label from training whose text embedding is the nearest.
        cosine: of the two embeddings.
    """

    label: str
    nearest: str
    cosine: float


def trained_labels(encoder: PointEncoder) -> dict[str, tuple[str, ...]] | None:
    """The labels that an encoder was trained to name, by part.

    Returns:
        Such as ``{"indoor": ("chair", …), "road": ("car", …)}``; None if it is not known, as for
        the published encoders.
    """
    need_kind(PointEncoder, "encoder, as load_encoder() gives", encoder=encoder)
    return None if encoder.labels_file is None else names_in(encoder.labels_file)


def unfamiliar(encoder: PointEncoder, texts: TextEmbeddings) -> list[Unfamiliar]:
    """Labels that nothing in an encoder's training resembles, so that it guesses.

    Args:
        encoder: what names clouds.
        texts: labels, embedded for it (:func:`budwood.points.text.embed_labels_for`).

    Returns:
        Those whose cosine with every label from training is below `FAMILIAR`, in their order; none
        where the labels of training are not known.
    """
    if encoder.labels_file is None:
        return []
    known = read_embeddings(encoder.labels_file)
    if known.vectors.shape[1] != texts.vectors.shape[1]:
        return []
    best, nearest = (texts.vectors.cpu() @ known.vectors.T).max(dim=1)
    return [
        Unfamiliar(label, known.labels[i], round(cosine, 3))
        for label, cosine, i in zip(texts.labels, best.tolist(), nearest.tolist())
        if cosine < FAMILIAR
    ]


def notice_of(strange: list[Unfamiliar]) -> str:
    """One line on labels that resemble none from training; empty without any."""
    if not strange:
        return ""
    named = ", ".join(f"{one.label!r} (nearest: {one.nearest})" for one in strange[:5])
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    return (
        f"the encoder was trained on nothing like {named}{more}; `budwood ls labels` lists what "
        "it knows"
    )


def warn_unfamiliar(encoder: PointEncoder, texts: TextEmbeddings) -> None:
    """Warn of labels that nothing in training resembles (:class:`InputWarning`)."""
    if notice := notice_of(unfamiliar(encoder, texts)):
        warn_user(notice)


def save_trained_labels(
    path: Path, labels: TextEmbeddings, parts: list[str], stamp: str | None = None
) -> None:
    """Write what an encoder was trained to name; recipes call it.

    Args:
        path: see :func:`budwood.points.label_file.labels_beside`.
        labels: with their embeddings.
        parts: of each label, such as ``"indoor"``.
        stamp: of the weights (:meth:`budwood.points.encoders.sprout.Sprout.text_stamp`); labels
            are refused beside weights with another one.
    """
    about = {"labels": json.dumps(list(labels.labels)), "parts": json.dumps(parts)}
    about |= {} if stamp is None else {"stamp": stamp}
    tensors: dict[str, Tensor] = {"embeddings": F.normalize(labels.vectors, dim=-1).half()}
    write_whole(path, lambda part: save_file(tensors, part, about))
