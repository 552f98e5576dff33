"""Prune the visual tokens of a vision-language model, with no training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.prune.budget import Budget as Budget
    from budwood.prune.chat import prepare as prepare
    from budwood.prune.encoded import Encoded as Encoded
    from budwood.prune.encoded import encode as encode
    from budwood.prune.families import FAMILIES as FAMILIES
    from budwood.prune.methods import METHODS as METHODS
    from budwood.prune.methods import Extras as Extras
    from budwood.prune.methods import Method as Method
    from budwood.prune.methods import Selection as Selection
    from budwood.prune.methods import Split as Split
    from budwood.prune.resize import resize_for as resize_for
    from budwood.prune.selection import select as select
    from budwood.prune.session import PruneSession as PruneSession
    from budwood.prune.session import attach as attach

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "FAMILIES": "families",
        "METHODS": "methods",
        "Budget": "budget",
        "Encoded": "encoded",
        "Extras": "methods",
        "Method": "methods",
        "PruneSession": "session",
        "Selection": "methods",
        "Split": "methods",
        "attach": "session",
        "encode": "encoded",
        "prepare": "chat",
        "resize_for": "resize",
        "select": "selection",
    },
)
