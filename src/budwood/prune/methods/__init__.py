"""Pruning methods, one file each. A new method is a new file and a line here."""

from __future__ import annotations

from budwood.prune.methods.base import Choice, Method, Selection, Split
from budwood.registry import Registry

METHODS = Registry(
    "method",
    {
        "adav": "budwood.prune.methods.adav:AdaV",
        "adav-official": "budwood.prune.methods.adav_official:AdaVOfficial",
        "adav-contrast": "budwood.prune.methods.adav_contrast:AdaVContrast",
        "fastervlm": "budwood.prune.methods.fastervlm:FasterVLM",
        "t2i": "budwood.prune.methods.t2i:T2I",
        "random": "budwood.prune.methods.baselines:Random",
        "uniform": "budwood.prune.methods.baselines:Uniform",
    },
)

__all__ = ["METHODS", "Choice", "Method", "Selection", "Split"]
