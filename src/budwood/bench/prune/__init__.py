"""Benchmarks of pruning: accuracy on held-out scenes, and speed."""

from __future__ import annotations

from budwood.bench.prune.accuracy import Config, Outcome, run
from budwood.bench.prune.rows import counts, rows_of
from budwood.bench.prune.variants import Variant, variants_of

__all__ = ["Config", "Outcome", "Variant", "counts", "rows_of", "run", "variants_of"]
