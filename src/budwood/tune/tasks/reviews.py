"""Natural text to labels: what a sentence of a review is about, and whether it is praise.

``reviews.jsonl`` has the 2,982 different sentences of Kotzias et al. 2015 (Sentiment Labelled
Sentences, UCI Machine Learning Repository, CC BY 4.0): for each of products, films and restaurants
almost 500 of praise and almost 500 of complaint.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("reviews.jsonl")
SIZES = {"validation": 300, "test": 600}
"""Sentences; the others are for training."""
ABOUT = ("product", "film", "restaurant")
LABELS = tuple(f"{about}: {verdict}" for about in ABOUT for verdict in ("praise", "complaint"))
ASKED = "Label this sentence of a review.\n{text}"


def splits(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of each part; see :func:`budwood.tune.tasks.made`."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    rows = [_row(**json.loads(line)) for line in lines]
    random.Random(f"reviews {seed}").shuffle(rows)
    n_validation, n_later = SIZES["validation"], sum(SIZES.values())
    parts = {"validation": rows[:n_validation], "test": rows[n_validation:n_later]}
    return parts | {"train": rows[n_later:]}


def _row(text: str, about: str, praise: bool) -> dict[str, Any]:
    answer = 2 * ABOUT.index(about) + (not praise)
    return {"question": ASKED.format(text=text), "choices": list(LABELS), "answer": answer}
