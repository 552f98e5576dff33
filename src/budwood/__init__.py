"""budwood: abilities grafted onto frozen pretrained transformers.

Importing the package patches nothing and loads no model: ``budwood.prune`` drops visual tokens,
``budwood.tune`` fine-tunes and forgets little, ``budwood.points`` names sparse point clouds.
"""

from __future__ import annotations

from budwood.errors import (
    AttachError,
    BudgetError,
    BudwoodError,
    DivergedError,
    InputError,
    MergeError,
    MissingPackageError,
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
    "DivergedError",
    "InputError",
    "MergeError",
    "MissingPackageError",
    "OutputError",
    "ShapeError",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
]
