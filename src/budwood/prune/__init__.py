"""Prune the visual tokens of a vision-language model, with no training.

The names below are imported on first use, so that importing the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.prune.budget import Budget
    from budwood.prune.families import FAMILIES
    from budwood.prune.methods import METHODS, Choice, Method
    from budwood.prune.selection import Selection, Split, select
    from budwood.prune.session import PruneSession, attach

__all__ = [
    "FAMILIES",
    "METHODS",
    "Budget",
    "Choice",
    "Method",
    "PruneSession",
    "Selection",
    "Split",
    "attach",
    "select",
]

_HOMES = {
    "FAMILIES": "families",
    "METHODS": "methods",
    "Budget": "budget",
    "Choice": "methods",
    "Method": "methods",
    "PruneSession": "session",
    "Selection": "selection",
    "Split": "selection",
    "attach": "session",
    "select": "selection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
