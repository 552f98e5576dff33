"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood import catalogue, checks
from budwood.errors import BudgetError, InputError
from budwood.loading import check_dtype
from budwood.prune.budget import Budget
from budwood.registry import Registry


def _known_dtype(name: str) -> str:
    check_dtype(name)
    return name


def _known_method(name: str) -> str:
    Registry("method", catalogue.PRUNING_METHODS).check(name)
    return name


def _in_range(seed: int) -> int:
    checks.need_seed(seed)
    return seed


Model = Annotated[
    str | None,
    typer.Option(
        metavar="ID|DIR", help="Hub id or directory of the model; by default sprout, embedded."
    ),
]
Method = Annotated[
    str, typer.Option(callback=_known_method, help="Pruning method; see `budwood ls methods`.")
]
Device = Annotated[
    str, typer.Option(help="Such as cpu or cuda:0; auto takes the first GPU, else the CPU.")
]
Dtype = Annotated[
    str,
    typer.Option(
        callback=_known_dtype,
        help="float32, bfloat16 or float16; auto takes the checkpoint's own.",
    ),
]
Seed = Annotated[
    int, typer.Option(callback=_in_range, help="Seed of everything that is drawn at random.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a record (JSON) to this file.")
]
Compat = Annotated[
    str | None,
    typer.Option(metavar="official", help="Do as the published code does, faults included."),
]


def keep_of(text: str) -> int | float:
    """Read a budget: ``64`` is a count, ``0.1`` a fraction of the visual tokens.

    Raises:
        BudgetError: it is neither.
    """
    try:
        value = int(text) if text.strip().lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise BudgetError(
            f"keep={text!r} is not a number; give a count ≥ 1 such as 64, or a ratio in (0, 1] "
            "such as 0.1"
        ) from None
    return Budget.parse(value).keep


def listed(text: str) -> list[str]:
    """Split a list with commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def counts_of(text: str, name: str) -> tuple[int, ...]:
    """Read a list of whole numbers with commas.

    Args:
        text: the value of an option.
        name: of the option, for the message.

    Raises:
        InputError: it is empty, or an item is no whole number.
    """
    items = listed(text)
    if not items or not all(item.isdecimal() for item in items):
        raise InputError(f"{name}={text!r} is no list of whole numbers such as 64,32")
    return tuple(map(int, items))
