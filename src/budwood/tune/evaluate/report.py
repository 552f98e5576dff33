"""Before, after and difference, as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from budwood.errors import InputError
from budwood.tune.evaluate.scores import Score, compare, compare_mean, mean_of


def report_rows(
    befores: Sequence[Score], afters: Sequence[Score], seed: int = 0
) -> list[dict[str, Any]]:
    """One row a score, and one for the mean accuracy of each group that has several tasks.

    Args:
        befores: of the base model.
        afters: of the tuned one, in any order.
        seed: of the bootstrap.

    Returns:
        Rows as :func:`budwood.tune.evaluate.scores.compare` gives them, targets first.

    Raises:
        InputError: two scores before, or two after, are of the same task and metric.
    """
    for scores in (befores, afters):
        if len({score.key for score in scores}) < len(scores):
            raise InputError("two scores are of the same task and metric; give each task a name")
    known = {score.key: score for score in befores}
    pairs = [(known[score.key], score) for score in afters if score.key in known]
    rows = []
    for group in ("target", "general"):
        mine = [(b, a) for b, a in pairs if a.group == group]
        rows += [compare(before, after, seed) for before, after in mine]
        accuracies = [(b, a) for b, a in mine if a.metric == "accuracy"]
        if len(accuracies) > 1:
            rows.append(_mean_row(group, accuracies, seed))
    return rows


def _mean_row(group: str, pairs: Sequence[tuple[Score, Score]], seed: int) -> dict[str, Any]:
    befores, afters = [b for b, _ in pairs], [a for _, a in pairs]
    gap, low, high = compare_mean(befores, afters, seed)
    return {
        "task": "mean",
        "metric": "accuracy",
        "group": group,
        "n": sum(score.n for score in afters),
        "before": mean_of("mean", befores),
        "after": mean_of("mean", afters),
        "difference": gap,
        "low": low,
        "high": high,
    }
