"""What a comparison of pruning methods runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from budwood.catalogue import POSITIONS
from budwood.checks import need_at_least
from budwood.errors import InputError, UnknownNameError
from budwood.prune.budget import Budget
from budwood.prune.inside import SCHEDULES, Schedule
from budwood.prune.methods import METHODS
from budwood.prune.question import PUBLISHED, QUESTIONS
from budwood.prune.selection import published_form, resolve_method
from budwood.spec import build, parse_spec

OWN = "own"
"""In a list of positions: each method's own."""
_REFERENCE = "adav"


@dataclass(frozen=True)
class Variant:
    """One way of pruning, at any budget.

    Attributes:
        method: a name in ``METHODS`` or ``SCHEDULES``, also with parameters.
        question: which text counts as the question; None if the method reads no text.
        positions: where the LLM sees what is kept, as in ``attach``; None for the method's own.
    """

    method: str
    question: str | None = PUBLISHED
    positions: str | None = None

    @property
    def inside(self) -> bool:
        """Whether it prunes inside the LLM, and not before it."""
        return _is_inside(self.method)

    @property
    def schedule(self) -> Schedule:
        """Of a method inside the LLM. The budget is what is left in the end, as papers count."""
        return build(self.method, SCHEDULES, average=False)

    @property
    def resolved(self) -> str:
        """The method with all its parameters, such as ``"AdaV(reserve=0.1, temperature=50.0)"``."""
        return repr(self.schedule if self.inside else resolve_method(self.method))

    @property
    def options(self) -> dict[str, str | None]:
        """Arguments for ``attach``."""
        return {
            "method": self.method,
            "question": self.question or PUBLISHED,
            "positions": self.positions,
        }

    @property
    def placed(self) -> str:
        """Where the LLM sees what is kept, one of ``POSITIONS``."""
        if self.inside:
            return "original"
        return self.positions or resolve_method(self.method).positions


@dataclass(frozen=True)
class Run:
    """One row of a comparison: a baseline, or a variant at a budget.

    Attributes:
        baseline: its name, ``"full"`` or ``"blind"``; empty for a variant.
        variant: how tokens are chosen; None for a baseline.
        keep: the budget, as in ``attach``; None for a baseline.
    """

    baseline: str
    variant: Variant | None = None
    keep: int | float | None = None

    @property
    def method(self) -> str:
        """The name of the baseline or method."""
        return self.variant.method if self.variant else self.baseline


FULL = Run("full")
"""All visual tokens."""
BLIND = Run("blind")
"""All visual tokens of a grey picture."""


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        variants: methods to compare.
        keeps: budgets, each a count or a fraction as in ``attach``.
        seed: of the scenes, the draws of methods and the bootstrap.
        n_scenes: scenes; each has one question of every kind that it allows.
        split: ``"test"``, or ``"shifted"`` for looks outside the training range.
        high_resolution: ask about large pictures with many small objects.
        batch: about how many questions a call answers; whole scenes.
        max_new_tokens: where an answer is cut.
        n_timed: questions whose first token is timed.
        n_resamples: of the bootstrap.
        turns: questions in a chat, of which the last counts; those before it are about other
            objects and have their right answers.
        reference: one of the methods; differences are to its first variant at the same budget.
            None: ``adav``, if it takes part.

    Raises:
        InputError: a number is too small, a budget comes twice, or the reference takes no part.
        BudgetError: a budget is neither a count nor a fraction.
    """

    variants: tuple[Variant, ...]
    keeps: tuple[int | float, ...]
    seed: int = 0
    n_scenes: int = 200
    split: str = "test"
    high_resolution: bool = False
    batch: int = 24
    max_new_tokens: int = 4
    n_timed: int = 10
    n_resamples: int = 2000
    turns: int = 1
    reference: str | None = None

    def __post_init__(self) -> None:
        names = ("n_scenes", "batch", "max_new_tokens", "n_timed", "n_resamples", "turns")
        need_at_least(1, **{name: getattr(self, name) for name in names})
        if not self.variants or not self.keeps:
            raise InputError("nothing to compare: give at least one method and one budget")
        for keep in self.keeps:
            Budget.parse(keep)
        if len(set(self.runs)) < len(self.runs):
            raise InputError(
                f"keep={','.join(map(str, self.keeps))} has a budget twice, or 1 (a token) beside "
                "1.0 (all of them); leave one out"
            )
        methods = list(dict.fromkeys(variant.method for variant in self.variants))
        if self.reference is None and _REFERENCE in methods:
            object.__setattr__(self, "reference", _REFERENCE)
        elif self.reference not in (None, *methods):
            raise InputError(
                f"reference={self.reference!r} takes no part; give one of {', '.join(methods)}"
            )

    @property
    def runs(self) -> list[Run]:
        """All that is compared: baselines, then budget by budget."""
        pruned = [Run("", variant, keep) for keep in self.keeps for variant in self.variants]
        return [FULL, BLIND, *pruned]

    def first_question(self, run: Run) -> Run | None:
        """The run of the same method, positions and budget with the first choice of question."""
        if run.variant is None:
            return None
        question = run.variant.question
        same = (
            other
            for other in self.runs
            if other.variant
            and other.keep == run.keep
            and dataclasses.replace(other.variant, question=question) == run.variant
        )
        return next(same)

    def reference_run(self, keep: int | float | None) -> Run | None:
        """The run that others of this budget are compared to, if the reference takes part."""
        runs = (run for run in self.runs if run.variant and run.keep == keep)
        return next((run for run in runs if run.method == self.reference), None)


def variants_of(
    methods: Sequence[str],
    compat: str | None = None,
    questions: Sequence[str] = (PUBLISHED,),
    positions: Sequence[str] = (OWN,),
) -> list[Variant]:
    """List every variant of some methods, in order and without repeats.

    Args:
        methods: names in ``METHODS`` or ``SCHEDULES``, also with parameters.
        compat: ``"official"`` adds ``NAME-official`` behind every method that has one.
        questions: choices of question; methods that read no text are run once.
        positions: some of ``POSITIONS``, or ``"own"`` for each method's; methods inside the LLM
            are run once.

    Raises:
        UnknownNameError: an unknown name.
        InputError: no method, no choice of question, or no positions.
    """
    if not methods or not questions or not positions:
        raise InputError(
            "nothing to compare: give at least one method, choice of question and positions"
        )
    for what, given, known in (
        ("question", questions, QUESTIONS),
        ("positions", positions, (OWN, *POSITIONS)),
    ):
        for name in given:
            if name not in known:
                raise UnknownNameError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    names = [name for method in methods for name in _forms(method, compat)]
    variants = [
        Variant(name, question, place)
        for name in names
        for question in (questions if _reads_text(name) else [None])
        for place in _places(name, positions)
    ]
    return list(dict.fromkeys(variants))


def _places(method: str, positions: Sequence[str]) -> list[str | None]:
    """Positions of a method that are not its own, and None for its own."""
    if _is_inside(method):
        return [None]
    own = resolve_method(method).positions
    return [None if place in (OWN, own) else place for place in positions]


def _forms(method: str, compat: str | None) -> list[str]:
    """A method, and its published form where ``compat`` asks for it and there is one."""
    if _is_inside(method):
        build(method, SCHEDULES)
        return [method]
    name = parse_spec(method)[0]
    METHODS.check(name)
    if compat is None or (compat == "official" and f"{name}-official" not in METHODS):
        return [method]
    resolve_method(method, compat)
    return [method, published_form(method)]


def _reads_text(method: str) -> bool:
    return not _is_inside(method) and resolve_method(method).needs_text


def _is_inside(method: str) -> bool:
    return parse_spec(method)[0] in SCHEDULES
