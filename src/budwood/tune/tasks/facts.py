"""Facts that no model knows: colour, material and origin of made-up products.

Each fact is told in several ways in training and asked in others in validation and tests, so that
the words of a question are no help. The answer is one of the values of its kind.
"""

from __future__ import annotations

import random
from typing import Any

N_PRODUCTS = 20
KINDS = (
    "kettle",
    "lamp",
    "backpack",
    "chair",
    "drill",
    "radio",
    "scooter",
    "tent",
    "clock",
    "oven",
)
VALUES = {
    "colour": ("red", "green", "blue", "yellow", "black", "white"),
    "material": ("steel", "oak", "bamboo", "copper", "glass", "cork"),
    "origin": ("Norway", "Portugal", "Japan", "Kenya", "Chile", "Canada"),
}
ASKED = {
    "colour": (
        "What colour is the {name}?",
        "Which colour does the {name} come in?",
        "I'd like to know the colour of the {name}.",
        "The {name} is sold in one colour. Which one?",
        "Tell me the colour of the {kind} called {name}.",
        "In what colour is the {name} made?",
        "If I order the {name}, what colour will it be?",
        "Name the colour of the {name}.",
    ),
    "material": (
        "What is the {name} made of?",
        "Which material is the {name} made of?",
        "I'd like to know the material of the {name}.",
        "The {name} is built from one material. Which one?",
        "Tell me what the {kind} called {name} is made of.",
        "From which material do they make the {name}?",
        "If I order the {name}, what material will it be?",
        "Name the material of the {name}.",
    ),
    "origin": (
        "Where is the {name} made?",
        "Which country does the {name} come from?",
        "I'd like to know the country of origin of the {name}.",
        "The {name} is produced in one country. Which one?",
        "Tell me where the {kind} called {name} is made.",
        "In which country do they make the {name}?",
        "If I order the {name}, from which country will it come?",
        "Name the country in which the {name} is produced.",
    ),
}
N_TRAIN, N_VALIDATION = 5, 1
"""Ways of asking that are trained on and validated with; the others are for tests."""
SYLLABLES = ("ba", "do", "fen", "gri", "hul", "ka", "lor", "mi", "nex", "pol", "ru", "sta", "tiv")


def splits(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of each part; see :func:`budwood.tune.tasks.made`."""
    rng = random.Random(f"facts {seed}")
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number, name in enumerate(_names(rng)):
        kind = KINDS[number % len(KINDS)]
        for asked, values in VALUES.items():
            answer = rng.randrange(len(values))
            for i, question in enumerate(ASKED[asked]):
                later = "validation" if i < N_TRAIN + N_VALIDATION else "test"
                part = "train" if i < N_TRAIN else later
                row = {"question": question.format(name=name, kind=kind), "answer": answer}
                parts[part].append(row | {"choices": list(values)})
    for rows in parts.values():
        rng.shuffle(rows)
    return parts


def _names(rng: random.Random) -> list[str]:
    """Names of products, such as "Grimilor 40"; no two share their first word."""
    words: set[str] = set()
    while len(words) < N_PRODUCTS:
        words.add("".join(rng.sample(SYLLABLES, 3)).capitalize())
    return [f"{word} {rng.randrange(10, 100)}" for word in sorted(words)]
