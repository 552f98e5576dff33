"""The file of labels that an encoder was trained to name. No torch: the command line lists them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from budwood.errors import InputError, first_line

SPROUT_LABELS = Path(__file__).parent / "weights" / "sprout-labels.safetensors"
"""Of the encoder that ships."""


def labels_beside(weights: Path) -> Path:
    """Where the labels of an encoder's weights are, if they are known."""
    return weights.with_name(f"{weights.stem}-labels.safetensors")


def stamp_in(path: Path) -> str | None:
    """What the labels have in common with the weights trained on them; None in older files.

    Raises:
        InputError: the file is missing, truncated, or holds something else.
    """
    return _about(path).get("stamp")


def names_in(path: Path) -> dict[str, tuple[str, ...]]:
    """Labels by part, each sorted.

    Raises:
        InputError: the file is missing, truncated, or holds something else.
    """
    about = _about(path)
    try:
        labels, parts = json.loads(about["labels"]), json.loads(about["parts"])
        pairs = sorted(zip(parts, labels, strict=True))
    except (KeyError, ValueError, TypeError) as error:
        raise _unusable(path, error) from None
    return {part: tuple(label for one, label in pairs if one == part) for part in sorted({*parts})}


def _about(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} holds no labels of training: {first_line(error)}")
