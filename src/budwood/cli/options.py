"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from budwood import catalogue, checks
from budwood.errors import BudgetError, InputError, UnknownNameError
from budwood.loading import check_dtype
from budwood.prune.budget import Budget
from budwood.registry import Registry
from budwood.spec import parse_spec


def _checked(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A callback that refuses a value while options are read, before anything heavy is imported."""

    def callback(value: Any) -> Any:
        check(value)
        return value

    return callback


def each(check: Callable[[str], object]) -> Callable[[str], str]:
    """The same for every item of a list with commas."""
    return _checked(lambda text: [check(item) for item in listed(text)])


_METHODS = Registry("method", catalogue.PRUNING_METHODS, catalogue.INSIDE_HINTS)
_TUNERS = Registry("tuning method", catalogue.TUNERS)
_ADAPTATIONS = Registry("method", catalogue.ADAPTATIONS)


def _check_method(spec: str) -> None:
    _METHODS.check(parse_spec(spec)[0])


def _check_bench_method(spec: str) -> None:
    name = parse_spec(spec)[0]
    if name not in catalogue.INSIDE_METHODS:
        _METHODS.check(name)


def _check_tuner(spec: str) -> None:
    _TUNERS.check(parse_spec(spec)[0])


def _check_question(name: str) -> None:
    if name not in catalogue.QUESTIONS:
        raise UnknownNameError(
            f"unknown --question {name!r}; give one of {', '.join(catalogue.QUESTIONS)}"
        )


def _check_positions(name: str | None) -> None:
    if name not in (None, *catalogue.POSITIONS):
        raise UnknownNameError(
            f"unknown positions {name!r}; give {' or '.join(catalogue.POSITIONS)}"
        )


def _check_own_positions(name: str) -> None:
    _check_positions(None if name == "own" else name)


def _check_part(name: str) -> None:
    if name not in catalogue.CLOUD_PARTS:
        raise UnknownNameError(
            f"unknown part {name!r}; give one of {', '.join(catalogue.CLOUD_PARTS)}"
        )


def _check_compat(name: str | None) -> None:
    if name not in (None, "official"):
        raise UnknownNameError(f"unknown compat {name!r}; give official, or leave it out")


known_dtype = _checked(check_dtype)


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


Model = Annotated[
    str | None,
    typer.Option(
        metavar="ID|DIR",
        help="Hub id or directory of the model; by default the embedded sprout. Also sprout-256.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        callback=_checked(_check_method),
        metavar="NAME[:KEY=VALUE+…]",
        help="Pruning method; see `budwood ls methods`.",
    ),
]
BEST_METHOD = "adav+"
"""Of `budwood prune`, if no method is given."""
MethodOrBest = Annotated[
    str | None,
    typer.Option(
        "--method",
        callback=_checked(lambda spec: None if spec is None else _check_method(spec)),
        metavar="NAME[:KEY=VALUE+…]",
        show_default=BEST_METHOD,
        help="Pruning method; see `budwood ls methods`.",
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        callback=each(_check_method),
        metavar="NAME[:KEY=VALUE+…],…",
        help="Pruning methods; see `budwood ls methods`.",
    ),
]
BenchMethods = Annotated[
    str,
    typer.Option(
        callback=each(_check_bench_method),
        metavar="NAME[:KEY=VALUE+…],…",
        help=f"Pruning methods; see `budwood ls methods`. Or inside the LLM: "
        f"{', '.join(catalogue.INSIDE_METHODS)}.",
    ),
]
Tuner = Annotated[
    str,
    typer.Option(
        callback=_checked(_check_tuner),
        metavar="NAME[:KEY=VALUE+…]",
        help="slim, or another of `budwood ls tuners`.",
    ),
]
Tuners = Annotated[
    str,
    typer.Option(
        callback=each(_check_tuner),
        metavar="NAME[:KEY=VALUE+…],…",
        help="Methods to compare; see `budwood ls tuners`.",
    ),
]
Adaptations = Annotated[
    str,
    typer.Option(
        callback=each(_ADAPTATIONS.check),
        metavar="NAME,…",
        help="Some of `budwood ls adaptations`.",
    ),
]
Adaptation = Annotated[
    str,
    typer.Option(callback=_checked(_ADAPTATIONS.check), help="One of `budwood ls adaptations`."),
]
Part = Annotated[
    str,
    typer.Option(
        callback=_checked(_check_part),
        help="Clouds that ship: indoor, road, or both, one after the other.",
    ),
]
Keep = Annotated[
    str,
    typer.Option(
        callback=_checked(keep_of),
        metavar="N|FRACTION",
        help="Visual tokens to keep: a count or a fraction.",
    ),
]
Keeps = Annotated[
    str,
    typer.Option(
        callback=each(keep_of),
        metavar="N|FRACTION,…",
        help="Budgets: counts of visual tokens, or fractions in (0, 1].",
    ),
]
Question = Annotated[
    str,
    typer.Option(
        "--question",
        callback=_checked(_check_question),
        metavar="current|all|turn",
        help="Text that tokens are chosen by. current: the user's last turn; turn: the picture's "
        "own turn; all: everything after the picture, as published.",
    ),
]
Positions = Annotated[
    str | None,
    typer.Option(
        callback=_checked(_check_positions),
        metavar="original|compact",
        help="Positions of what is kept. original: as in the whole prompt; compact: they count "
        "what is left. By default the method's own: original for adav+, compact for all others.",
    ),
]
SeveralPositions = Annotated[
    str,
    typer.Option(
        "--positions",
        callback=each(_check_own_positions),
        metavar="NAME,…",
        help="One or more of own, original and compact; see `budwood prune --help`.",
    ),
]
Questions = Annotated[
    str,
    typer.Option(
        callback=each(_check_question),
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
        help="float32, bfloat16 or float16; auto takes the checkpoint's own, and float32 for "
        "embedded models on a CPU without bfloat16.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        callback=_checked(checks.need_seed), help="Seed of everything that is drawn at random."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a record (JSON) to this file.")
]
Compat = Annotated[
    str | None,
    typer.Option(
        callback=_checked(_check_compat),
        metavar="official",
        help="official: the same as method adav-official.",
    ),
]


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
