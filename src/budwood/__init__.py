"""budwood: abilities grafted onto frozen pretrained transformers.

``budwood.prune`` drops visual tokens, ``budwood.tune`` fine-tunes and forgets little,
``budwood.points`` recognises sparse point clouds. ``budwood.load("sprout")`` gives the embedded
vision-language model. Importing the package patches nothing, loads no model, and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.errors import (
    AttachError,
    BudgetError,
    BudwoodError,
    DivergedError,
    InputError,
    MergeError,
    MissingPackageError,
    OptionError,
    OutputError,
    ShapeError,
    UnknownNameError,
    UnsupportedModelError,
)
from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.loading import load

__version__ = "0.1.0"

__getattr__, __dir__, _ = lazy_exports(__name__, {"load": "loading"})

__all__ = [
    "AttachError",
    "BudgetError",
    "BudwoodError",
    "DivergedError",
    "InputError",
    "MergeError",
    "MissingPackageError",
    "OptionError",
    "OutputError",
    "ShapeError",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "load",
]
