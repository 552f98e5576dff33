"""Pruning methods, one file each. A new method is a new file and an entry in ``catalogue``."""

from __future__ import annotations

from budwood import catalogue
from budwood.prune.methods.base import Extras, Method, Selection, Split
from budwood.registry import Registry

METHODS = Registry("method", catalogue.PRUNING_METHODS, catalogue.INSIDE_HINTS)

__all__ = ["METHODS", "Extras", "Method", "Selection", "Split"]
