"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood import catalogue, checks
from budwood.errors import BudgetError, InputError, UnknownNameError
from budwood.loading import check_dtype
from budwood.prune.budget import Budget
from budwood.registry import Registry


def _known_methods(names: str) -> str:
    for name in listed(names):
        _known_method(name)
    return names


def _known_tuner(name: str) -> str:
    Registry("tuning method", catalogue.TUNERS).check(name.partition(":")[0].strip())
    return name


def _known_tuners(names: str) -> str:
    for name in listed(names):
        _known_tuner(name)
    return names


def _known_adaptations(names: str) -> str:
    for name in listed(names):
        Registry("method", catalogue.ADAPTATIONS).check(name)
    return names


def _known_questions(names: str) -> str:
    for name in listed(names):
        if name not in catalogue.QUESTIONS:
            raise UnknownNameError(
                f"unknown question {name!r}; give {' or '.join(catalogue.QUESTIONS)}"
            )
    return names


def _known_compat(name: str | None) -> str | None:
    if name not in (None, "official"):
        raise UnknownNameError(f"unknown compat {name!r}; give official, or leave it out")
    return name


def _budget(text: str) -> str:
    keep_of(text)
    return text


def _budgets(text: str) -> str:
    for item in listed(text):
        keep_of(item)
    return text


def known_dtype(name: str) -> str:
    """Refuse an unknown dtype while options are read."""
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
Methods = Annotated[
    str,
    typer.Option(
        callback=_known_methods, metavar="NAME,…", help="Pruning methods; see `budwood ls methods`."
    ),
]
Tuner = Annotated[
    str,
    typer.Option(
        callback=_known_tuner,
        metavar="NAME[:KEY=VALUE+…]",
        help="slim, or another of `budwood ls tuners`.",
    ),
]
Tuners = Annotated[
    str,
    typer.Option(
        callback=_known_tuners,
        metavar="NAME[:KEY=VALUE+…],…",
        help="Methods to compare; see `budwood ls tuners`.",
    ),
]
Adaptations = Annotated[
    str,
    typer.Option(
        callback=_known_adaptations, metavar="NAME,…", help="Some of `budwood ls adaptations`."
    ),
]
Keep = Annotated[
    str,
    typer.Option(
        callback=_budget, metavar="N|FRACTION", help="Visual tokens to keep: a count or a fraction."
    ),
]
Keeps = Annotated[
    str,
    typer.Option(
        callback=_budgets,
        metavar="N|FRACTION,…",
        help="Budgets: counts of visual tokens, or fractions in (0, 1].",
    ),
]
Question = Annotated[
    str,
    typer.Option(
        "--question",
        callback=_known_questions,
        metavar="current|all|turn",
        help="Text that tokens are chosen by. current: the user's last turn; turn: the picture's "
        "own turn; all: everything after the picture, as published.",
    ),
]
Questions = Annotated[
    str,
    typer.Option(
        callback=_known_questions,
        metavar="NAME,…",
        help="One or more of current, turn and all; see `budwood prune --help`.",
    ),
]
Device = Annotated[
    str, typer.Option(help="Such as cpu or cuda:0; auto takes the first GPU, else the CPU.")
]
Dtype = Annotated[
    str,
    typer.Option(
        callback=known_dtype,
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
    typer.Option(
        callback=_known_compat,
        metavar="official",
        help="official: the same as method adav-official.",
    ),
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
            f"keep={text!r} is not a number; give a count ≥ 1 such as 64, or a fraction in (0, 1] "
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
        InputError: it is empty, or an item is not a whole number.
    """
    items = listed(text)
    if not items or not all(item.isdecimal() for item in items):
        raise InputError(f"{name}={text!r}: give whole numbers with commas, such as 64,32")
    return tuple(map(int, items))
