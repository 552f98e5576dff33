"""Options that several commands share, and their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood.errors import BudgetError, InputError
from budwood.prune.budget import Budget

Model = Annotated[
    str | None,
    typer.Option(metavar="ID|DIR", help="Hub id or directory; left out: sprout, the embedded one."),
]
Device = Annotated[
    str, typer.Option(help="Such as cpu or cuda:0; auto: the first GPU, else the CPU.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16; auto: the checkpoint's own.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a record (JSON) to this file.")
]
Compat = Annotated[
    str | None, typer.Option(metavar="official", help="Include the published code's behaviour.")
]


def keep_of(text: str) -> int | float:
    """A budget from the command line: ``64`` is a count, ``0.1`` a share.

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
    """The items of a list with commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def counts_of(text: str, name: str) -> tuple[int, ...]:
    """The whole numbers of a list with commas, which is the value of the option ``name``.

    Raises:
        InputError: something else, or none.
    """
    items = listed(text)
    if not items or not all(item.isdecimal() for item in items):
        raise InputError(f"{name}={text!r} is no list of whole numbers such as 64,32")
    return tuple(map(int, items))
