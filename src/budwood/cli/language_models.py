"""Old names of what is in :mod:`budwood.cli.models` and :mod:`budwood.loading`."""

from __future__ import annotations

from budwood.cli.models import load_adapted, load_language_model
from budwood.loading import SMOLLM2_ID as DEFAULT
from budwood.loading import Loaded as LanguageModel
from budwood.loading import third_party_warnings_off
from budwood.tune.loading import base_of as _base_of

__all__ = [
    "DEFAULT",
    "LanguageModel",
    "_base_of",
    "load_adapted",
    "load_language_model",
    "third_party_warnings_off",
]
