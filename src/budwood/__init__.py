"""budwood: abilities grafted onto frozen pretrained transformers.

Importing the package patches nothing and loads no model; ``budwood.prune`` has what to use.
"""

from __future__ import annotations

from budwood.errors import (
    AttachError,
    BudgetError,
    BudwoodError,
    InputError,
    MergeError,
    OutputError,
    ShapeError,
    UnknownNameError,
    UnsupportedModelError,
)

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "BudgetError",
    "BudwoodError",
    "InputError",
    "MergeError",
    "OutputError",
    "ShapeError",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
]
