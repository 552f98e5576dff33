"""What is compared: a method, in its own or in its published form, with a choice of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from budwood.errors import InputError, UnknownNameError
from budwood.prune.methods import METHODS
from budwood.prune.question import QUESTIONS
from budwood.prune.selection import resolve_method

_OFFICIAL = "-official"


@dataclass(frozen=True)
class Variant:
    """One way of pruning, at any budget.

    Attributes:
        method: a name in ``METHODS``.
        compat: None, or ``"official"``.
        question: which text counts as the question; None if the method reads no text.
    """

    method: str
    compat: str | None = None
    question: str | None = QUESTIONS[0]

    @property
    def name(self) -> str:
        """The method, with ``-official`` behind it if it is the published form."""
        return self.method + (_OFFICIAL if self.compat else "")

    @property
    def options(self) -> dict[str, str | None]:
        """Arguments for ``attach``."""
        return {
            "method": self.method,
            "compat": self.compat,
            "question": self.question or QUESTIONS[0],
        }


def variants_of(
    methods: Sequence[str], compat: str | None = None, questions: Sequence[str] = QUESTIONS[:1]
) -> list[Variant]:
    """Every variant of some methods, in order and without repeats.

    Args:
        methods: names in ``METHODS``; ``NAME-official`` is its published form.
        compat: ``"official"`` adds the published form of every method that has one.
        questions: choices of question; methods that read no text are run once.

    Raises:
        UnknownNameError: an unknown name.
        InputError: no method, or no choice of question.
    """
    if not methods or not questions:
        raise InputError("nothing to compare: give at least one method and one choice of question")
    for question in questions:
        if question not in QUESTIONS:
            known = ", ".join(QUESTIONS)
            raise UnknownNameError(f"unknown question {question!r}; known: {known}")
    found = []
    for name in methods:
        published = name.endswith(_OFFICIAL) and name not in METHODS
        method = name.removesuffix(_OFFICIAL) if published else name
        resolve_method(method, "official" if published else None)
        forms: list[str | None] = ["official"] if published else [None]
        if compat and not published and _has_official(method, compat):
            forms.append(compat)
        asked = questions if METHODS.get(method).needs_text else [None]
        found += [Variant(method, form, question) for form in forms for question in asked]
    return list(dict.fromkeys(found))


def _has_official(method: str, compat: str) -> bool:
    if compat != "official":
        raise UnknownNameError(f"unknown compat {compat!r}; known: official")
    try:
        resolve_method(method, compat)
    except UnknownNameError:
        return False
    return True
