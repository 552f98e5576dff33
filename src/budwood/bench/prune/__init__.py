"""Accuracy and speed of pruning methods on held-out scenes: plan, run, table."""

from __future__ import annotations

from budwood.bench.prune.accuracy import Outcome, run
from budwood.bench.prune.earlier import earlier_answers
from budwood.bench.prune.plan import Config, Variant, variants_of
from budwood.bench.prune.table import counts, rows_of
from budwood.bench.prune.workers import Workers

__all__ = [
    "Config",
    "Outcome",
    "Variant",
    "Workers",
    "counts",
    "earlier_answers",
    "rows_of",
    "run",
    "variants_of",
]
