"""Benchmarks of pruning: accuracy on held-out scenes, and speed."""

from __future__ import annotations

from budwood.prune.bench.accuracy import Config, Outcome, run
from budwood.prune.bench.rows import counts, rows_of
from budwood.prune.bench.variants import Variant, variants_of

__all__ = ["Config", "Outcome", "Variant", "counts", "rows_of", "run", "variants_of"]
