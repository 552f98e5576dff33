"""Class labels, and the sentences (templates) around them whose embeddings are averaged.

The templates are in the style of ULIP's ``modelnet40_64``, and 64 as well, but written anew: pass
the lines of the original file as ``templates`` to reproduce published numbers to the last digit.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from budwood.checks import need_kind
from budwood.errors import InputError

_MEDIA = (
    "a point cloud of {}.",
    "a point cloud model of {}.",
    "a 3D point cloud of {}.",
    "a sparse point cloud of {}.",
    "a dense point cloud of {}.",
    "a 3D model of {}.",
    "a 3D scan of {}.",
    "a LiDAR scan of {}.",
    "a depth map of {}.",
    "a rendering of {}.",
    "a CAD model of {}.",
    "a mesh of {}.",
    "a photo of {}.",
    "a picture of {}.",
    "an image of {}.",
    "a drawing of {}.",
)
_ADJECTIVES = (
    "a good point cloud of {}.",
    "a bad point cloud of {}.",
    "a clean point cloud of {}.",
    "a noisy point cloud of {}.",
    "a cropped point cloud of {}.",
    "an incomplete point cloud of {}.",
    "a low resolution point cloud of {}.",
    "a close-up scan of {}.",
    "a distant scan of {}.",
    "a partial view of {}.",
    "a side view of {}.",
    "a view of {} from above.",
    "a view of {} from below.",
    "a small version of {}.",
    "a large version of {}.",
    "a simple model of {}.",
)
_SENTENCES = (
    "{}.",
    "This is {}.",
    "This is a point cloud of {}.",
    "There is {}.",
    "There is {} in the scene.",
    "There is {} among the objects.",
    "These points show {}.",
    "These points belong to {}.",
    "The object is {}.",
    "The shape of {}.",
    "The outline of {}.",
    "The surface of {}.",
    "The geometry of {}.",
    "The object in the scan is {}.",
    "The scanner sees {}.",
    "One can see {}.",
)
_KINDS = (
    "a kind of object: {}.",
    "an object called {}.",
    "an everyday object: {}.",
    "a household object: {}.",
    "an item known as {}.",
    "one {}.",
    "the {}.",
    "my {}.",
    "a {}.",
    "some {}.",
    "a typical {}.",
    "a modern {}.",
    "an old {}.",
    "a toy {}.",
    "a real {}.",
    "a sculpture of {}.",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "points64": _MEDIA + _ADJECTIVES + _SENTENCES + _KINDS,
    "short": ("a point cloud of {}.", "a 3D model of {}.", "a photo of {}.", "{}."),
    "plain": ("{}",),
}


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 text file that are not empty.

    Raises:
        InputError: it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from None
    return [line for line in lines if line.strip()]


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """The labels in a text file, one a line; lines that begin with # are comments.

    Raises:
        InputError: it cannot be read, or is a table, or one line with commas.
    """
    lines = [line.strip() for line in read_lines(path)]
    lines = [line.rstrip(", ") for line in lines if not line.startswith("#")]
    if len(lines) == 1 and "," in lines[0]:
        labels = ",".join(label.strip() for label in lines[0].split(","))
        raise InputError(
            f"{path} has one line with commas; write a label on each line, or give --labels "
            f"{labels!r}"
        )
    numbered = [line for line in lines if re.match(r"\d+\s*[,;\t]", line)]
    if numbered:
        raise InputError(
            f"{path} is a table, with lines such as {numbered[0]!r}; write a label on each line, "
            "and nothing else"
        )
    return lines


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels without surrounding or repeated blanks.

    Raises:
        InputError: there are none, one is empty, or one is repeated (up to case and blanks).
    """
    if isinstance(labels, str):
        raise InputError(f"labels={labels!r} is one string; give a list of labels")
    need_kind(Iterable, "list of texts", labels=labels)
    labels = list(labels)
    for label in labels:
        if not isinstance(label, str):
            raise InputError(f"label {label!r} is of type {type(label).__name__}; give texts")
    cleaned = tuple(" ".join(label.split()) for label in labels)
    if not cleaned:
        raise InputError("there are no labels; give at least one")
    if "" in cleaned:
        raise InputError(f"label {cleaned.index('') + 1} of {len(cleaned)} is empty")
    seen: set[str] = set()
    for label in cleaned:
        key = _plain(label)
        if key in seen:
            raise InputError(f"label {label!r} is repeated; give each label once")
        seen.add(key)
    return cleaned


def _plain(label: str) -> str:
    """A label without case and without what is not seen, in one of Unicode's forms."""
    shown = "".join(char for char in label if unicodedata.category(char) != "Cf")
    return unicodedata.normalize("NFC", shown).casefold()


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return the sentences of a set of templates.

    Args:
        templates: a name in ``TEMPLATES``, a text file with a sentence a line, or sentences; each
            has ``{}`` where the label goes.

    Raises:
        InputError: an unknown name, no sentence at all, or one without ``{}``.
    """
    if isinstance(templates, str) and templates in TEMPLATES:
        return TEMPLATES[templates]
    if isinstance(templates, (str, os.PathLike)):
        if not Path(templates).is_file():
            known = ", ".join(TEMPLATES)
            raise InputError(f"templates {str(templates)!r} are not a file; names: {known}")
        sentences = tuple(read_lines(templates))
    else:
        if not isinstance(templates, Iterable) or isinstance(templates, bytes):
            raise InputError(f"templates={templates!r}; give a name, a file or a list of sentences")
        sentences = tuple(templates)
    if not sentences:
        raise InputError("templates are empty; give at least '{}'")
    for sentence in sentences:
        if not isinstance(sentence, str) or sentence.count("{}") != 1:
            raise InputError(f"template {sentence!r} must have {{}} once, where the label goes")
    return sentences
