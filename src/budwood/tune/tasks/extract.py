"""A new format: a sentence about a delivery to JSON with a date, an amount and a tag.

Dates become ISO 8601, amounts a number and the symbol of a unit, and the tag says whether goods
come or go. Validation and tests have sentences of other forms than training, and other values.
"""

from __future__ import annotations

import json
import random
from typing import Any

SIZES = {"train": 600, "validation": 120, "test": 200}
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
UNITS = {"kilograms": "kg", "grams": "g", "litres": "l", "metres": "m", "tonnes": "t"}
GOODS = ("flour", "sand", "paint", "rope", "coffee", "gravel", "milk", "cable", "rice", "cement")
FORMS = {
    "train": {
        "in": (
            "{day} {month} {year}: {amount} {unit} of {goods} arrived.",
            "We received {amount} {unit} of {goods} on {day} {month} {year}.",
            "On {month} {day}, {year} a truck brought us {amount} {unit} of {goods}.",
            "{amount} {unit} of {goods} came in on {month} {day}, {year}.",
        ),
        "out": (
            "{day} {month} {year}: {amount} {unit} of {goods} left.",
            "We sold {amount} {unit} of {goods} on {day} {month} {year}.",
            "On {month} {day}, {year} a customer picked up {amount} {unit} of {goods}.",
            "{amount} {unit} of {goods} went out on {month} {day}, {year}.",
        ),
    },
    "validation": {
        "in": ("Our stock grew by {amount} {unit} of {goods} on {day} {month} {year}.",),
        "out": ("Our stock shrank by {amount} {unit} of {goods} on {day} {month} {year}.",),
    },
    "test": {
        "in": (
            "A delivery of {amount} {unit} of {goods} reached us on {day} {month} {year}.",
            "On {month} {day}, {year} we bought {amount} {unit} of {goods}.",
        ),
        "out": (
            "We shipped {amount} {unit} of {goods} to a customer on {day} {month} {year}.",
            "On {month} {day}, {year} we delivered {amount} {unit} of {goods} to a shop.",
        ),
    },
}


def splits(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of each part; see :func:`budwood.tune.tasks.made`."""
    rng = random.Random(f"extract {seed}")
    seen: set[str] = set()
    return {part: [_row(rng, part, seen) for _ in range(n)] for part, n in SIZES.items()}


def _row(rng: random.Random, part: str, seen: set[str]) -> dict[str, str]:
    """A sentence that was not made before, and its JSON."""
    while True:
        way, unit, month = rng.choice(("in", "out")), rng.choice(list(UNITS)), rng.randrange(12)
        day, year = rng.randrange(1, 29), rng.randrange(2010, 2030)
        amount = rng.randrange(2, 1000)
        values = {"day": day, "month": MONTHS[month], "year": year, "amount": amount, "unit": unit}
        form = rng.choice(FORMS[part][way])
        sentence = form.format(**values, goods=rng.choice(GOODS))
        if sentence not in seen:
            seen.add(sentence)
            date = f"{year}-{month + 1:02}-{day:02}"
            answer = {"date": date, "amount": amount, "unit": UNITS[unit], "way": way}
            return {"question": sentence, "answer": json.dumps(answer)}
