"""Prune the visual tokens of a vision-language model, with no training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.prune.budget import Budget
    from budwood.prune.encoded import Encoded, encode
    from budwood.prune.families import FAMILIES
    from budwood.prune.methods import METHODS, Choice, Method, Selection, Split
    from budwood.prune.selection import select
    from budwood.prune.session import PruneSession, attach

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "FAMILIES": "families",
        "METHODS": "methods",
        "Budget": "budget",
        "Choice": "methods",
        "Encoded": "encoded",
        "Method": "methods",
        "PruneSession": "session",
        "Selection": "methods",
        "Split": "methods",
        "attach": "session",
        "encode": "encoded",
        "select": "selection",
    },
)
