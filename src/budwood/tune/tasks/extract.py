"""A new format: a sentence about a delivery to JSON with a date, an amount and a tag.

Dates become ISO 8601, amounts a number and the symbol of a unit, and the tag is the kind of goods.
Validation and tests have sentences of other forms than training, and other values.
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
GOODS = {
    "flour": "food",
    "coffee": "food",
    "milk": "food",
    "rice": "food",
    "sand": "building",
    "gravel": "building",
    "cement": "building",
    "paint": "tools",
    "rope": "tools",
    "cable": "tools",
}
"""Goods → their kind, which the tag names."""
FORMS = {
    "train": (
        "{day} {month} {year}: {amount} {unit} of {goods} arrived.",
        "We received {amount} {unit} of {goods} on {day} {month} {year}.",
        "On {month} {day}, {year} a truck brought us {amount} {unit} of {goods}.",
        "{amount} {unit} of {goods} came in on {month} {day}, {year}.",
        "Our supplier sent us {amount} {unit} of {goods} on {month} {day}, {year}.",
        "{day} {month} {year}: stock of {goods} filled up by {amount} {unit}.",
        "{day} {month} {year}: {amount} {unit} of {goods} left.",
        "We sold {amount} {unit} of {goods} on {day} {month} {year}.",
        "On {month} {day}, {year} a customer picked up {amount} {unit} of {goods}.",
        "{amount} {unit} of {goods} went out on {month} {day}, {year}.",
        "Our driver took {amount} {unit} of {goods} away on {month} {day}, {year}.",
        "{day} {month} {year}: stock of {goods} ran down by {amount} {unit}.",
    ),
    "validation": (
        "Our stock grew by {amount} {unit} of {goods} on {day} {month} {year}.",
        "On {month} {day}, {year} we were given {amount} {unit} of {goods}.",
        "{amount} {unit} of {goods} were unloaded here on {month} {day}, {year}.",
        "Our stock shrank by {amount} {unit} of {goods} on {day} {month} {year}.",
        "On {month} {day}, {year} we gave away {amount} {unit} of {goods}.",
        "{amount} {unit} of {goods} were sent off on {month} {day}, {year}.",
    ),
    "test": (
        "A delivery of {amount} {unit} of {goods} reached us on {day} {month} {year}.",
        "On {month} {day}, {year} we bought {amount} {unit} of {goods}.",
        "The warehouse took in {amount} {unit} of {goods} on {day} {month} {year}.",
        "{day} {month} {year}: received, {amount} {unit} of {goods}.",
        "Another {amount} {unit} of {goods} turned up on {month} {day}, {year}.",
        "We shipped {amount} {unit} of {goods} to a customer on {day} {month} {year}.",
        "On {month} {day}, {year} we delivered {amount} {unit} of {goods} to a shop.",
        "The warehouse handed out {amount} {unit} of {goods} on {day} {month} {year}.",
        "{day} {month} {year}: sold, {amount} {unit} of {goods}.",
        "Some {amount} {unit} of {goods} were carried off on {month} {day}, {year}.",
    ),
}


def splits(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of each part; see :func:`budwood.tune.tasks.made`."""
    rng = random.Random(f"extract {seed}")
    seen: set[str] = set()
    return {part: [_row(rng, part, seen) for _ in range(n)] for part, n in SIZES.items()}


def _row(rng: random.Random, part: str, seen: set[str]) -> dict[str, str]:
    """A sentence that was not made before, and its JSON."""
    while True:
        goods, unit, month = rng.choice(list(GOODS)), rng.choice(list(UNITS)), rng.randrange(12)
        day, year = rng.randrange(1, 29), rng.randrange(2010, 2030)
        amount = rng.randrange(2, 1000)
        values = {"day": day, "month": MONTHS[month], "year": year, "amount": amount, "unit": unit}
        sentence = rng.choice(FORMS[part]).format(**values, goods=goods)
        if sentence not in seen:
            seen.add(sentence)
            date = f"{year}-{month + 1:02}-{day:02}"
            answer = {"date": date, "amount": amount, "unit": UNITS[unit], "kind": GOODS[goods]}
            return {"question": sentence, "answer": json.dumps(answer)}
