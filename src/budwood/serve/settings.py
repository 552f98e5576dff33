"""Settings of pruning in a server, and the methods that it cannot serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from budwood.checks import need_seed
from budwood.errors import InputError, UnknownNameError, UnsupportedModelError
from budwood.prune.budget import Budget
from budwood.prune.methods.base import Method
from budwood.prune.question import Question
from budwood.prune.selection import resolve_method
from budwood.serve.vllm import KEY


@dataclass(frozen=True)
class Settings:
    """How all images of a server are pruned.

    Attributes:
        keep: a count of tokens, or a fraction of an image's candidates; a request may have another.
        method: a name in ``METHODS``, also with parameters.
        question: which text counts as the question: ``"current"`` (the last user turn),
            ``"turn"`` or ``"all"``. With ``"all"`` an image is encoded anew in each later turn.
        seed: for methods that draw.

    Raises:
        BudgetError: ``keep`` is neither a count nor a fraction.
        UnknownNameError: unknown method or question.
        UnsupportedModelError: the method cannot be served.
    """

    keep: int | float
    method: str = "adav"
    question: str = "current"
    seed: int = 0

    def __post_init__(self) -> None:
        Budget.parse(self.keep)
        Question(self.question)
        need_seed(self.seed)
        refuse_method(self.chosen)

    @cached_property
    def chosen(self) -> Method:
        """The method as an instance."""
        return resolve_method(self.method)

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Read the settings of a model's configuration.

        Raises:
            InputError: there are none, or they have an unknown key.
        """
        given = getattr(config, KEY, None)
        if not isinstance(given, Mapping) or "keep" not in given:
            raise InputError(
                f"the model's configuration has {KEY}={given!r}; give the budget with "
                '--hf-overrides \'{"budwood": {"keep": 0.1}, …}\', or use budwood serve'
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownNameError(f"unknown {KEY} setting {name!r}; known: {', '.join(known)}")
        return cls(**given)


def refuse_method(method: Method) -> None:
    """Refuse a method that a server cannot run.

    Raises:
        UnsupportedModelError: it reads the encoder's keys, or whole crops.
    """
    reason = (
        "reads keys of the vision encoder"
        if method.needs_keys
        else "reads whole crops"
        if method.whole_crops
        else None
    )
    if reason:
        raise UnsupportedModelError(
            f"method {method.name!r} {reason}, which is not served; choose another one (budwood ls "
            "methods), or use budwood.prune.attach"
        )
