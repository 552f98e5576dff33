"""Tasks that ship: lm-eval's settings for public data sets, and three tasks with data of their own.

:data:`MADE` lists those three. Each is a module with one function, ``splits(seed)``, which returns
rows of :func:`budwood.tune.data.examples.example_of` for training, validation and tests. The same
seed makes the same rows on every machine. Validation and tests ask in other words than training
does.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from budwood.tune.data.examples import Example, example_of

MADE: Mapping[str, str] = {
    "facts": "facts about made-up products, asked in words that training does not use",
    "extract": "a sentence to JSON with a date, an amount and a tag",
    "reviews": "what a sentence of a review is about, and whether it is praise",
}
"""Task with data of its own → what it asks. The modules of this package have these names."""
PARTS = ("train", "validation", "test")
SEED = 20_260_101
"""Seed of the data that is compared; other seeds make other facts and sentences."""


@cache
def made(name: str, seed: int = SEED) -> Mapping[str, tuple[Example, ...]]:
    """Make the examples of a task.

    Args:
        name: one of :data:`MADE`.
        seed: of the data.

    Returns:
        Part, one of :data:`PARTS` → examples.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    rows: Mapping[str, list[dict[str, Any]]] = module.splits(seed)
    return {part: tuple(example_of(row) for row in rows[part]) for part in PARTS}
