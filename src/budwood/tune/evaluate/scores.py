"""Scores of single items, their means, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from budwood.bootstrap import Floats, interval
from budwood.errors import InputError

N_RESAMPLES = 2_000
METRICS = ("accuracy", "loss", "perplexity", "kl")
"""``accuracy`` is better high, the others low. ``loss`` and ``kl`` are in nats per token."""

_CHUNK = 200
"""Resamples drawn at a time, which bounds memory."""


@dataclass(frozen=True)
class Score:
    """The scores of a model on the items of a task.

    Attributes:
        task: name of the task.
        metric: one of ``METRICS``.
        group: ``"target"`` or ``"general"``.
        values: per item: 1 or 0 for a right or wrong answer, or a sum over the item's tokens.
        weights: per item: 1, or its tokens. The mean is ``Σ values / Σ weights``.
    """

    task: str
    metric: str
    group: str
    values: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if not self.values or len(self.values) != len(self.weights):
            raise InputError(
                f"{self.task}: {len(self.values)} values and {len(self.weights)} weights; give "
                "as many, and at least one"
            )

    @property
    def key(self) -> tuple[str, str]:
        """Task and metric."""
        return self.task, self.metric

    @property
    def value(self) -> float:
        """The mean; its exponential for perplexity."""
        return float(_shown(self.metric, sum(self.values) / sum(self.weights)))

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.values)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "task": self.task,
            "metric": self.metric,
            "group": self.group,
            "values": [round(value, 6) for value in self.values],
            "weights": list(self.weights),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Score:
        """The opposite of :meth:`as_dict`."""
        lists = {key: tuple(found[key]) for key in ("values", "weights")}
        return cls(found["task"], found["metric"], found["group"], **lists)


def mean_of(task: str, scores: Sequence[Score]) -> float:
    """The unweighted mean of several scores.

    Raises:
        InputError: there are none.
    """
    if not scores:
        raise InputError(f"{task}: nothing to average")
    return sum(score.value for score in scores) / len(scores)


def compare(
    before: Score, after: Score, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> dict[str, Any]:
    """Before, after and difference, with a 95 % interval by a paired bootstrap over items.

    Args:
        before: of the base model.
        after: of the tuned one, on the same items in the same order.
        seed: of the draws.
        n_resamples: number of resamples.

    Returns:
        ``task, metric, group, n, before, after, difference, low, high``.

    Raises:
        InputError: the scores are not of the same items.
    """
    if before.key != after.key or before.weights != after.weights:
        raise InputError(f"{before.key} and {after.key} are not of the same items")
    drawn = resampled([before, after], seed, n_resamples)
    low, high = interval(drawn[1] - drawn[0])
    return {
        "task": after.task,
        "metric": after.metric,
        "group": after.group,
        "n": after.n,
        "before": before.value,
        "after": after.value,
        "difference": after.value - before.value,
        "low": low,
        "high": high,
    }


def compare_mean(
    befores: Sequence[Score], afters: Sequence[Score], seed: int = 0, n_resamples: int = N_RESAMPLES
) -> tuple[float, float | None, float | None]:
    """The difference of the mean over several tasks; the interval resamples each task by itself."""
    gaps = np.zeros(n_resamples)
    for i, (before, after) in enumerate(zip(befores, afters)):
        drawn = resampled([before, after], seed + i, n_resamples)
        gaps += (drawn[1] - drawn[0]) / len(befores)
    gap = mean_of("mean", afters) - mean_of("mean", befores)
    low, high = interval(gaps)
    return gap, low, high


def resampled(scores: Sequence[Score], seed: int, n_resamples: int) -> Floats:
    """Means in resamples of the items, the same draws for all scores.

    Args:
        scores: of the same items.
        seed: of the draws.
        n_resamples: number of resamples.

    Returns:
        Shape (n_scores, n_resamples).
    """
    generator = np.random.default_rng(seed)
    n = scores[0].n
    values = np.array([score.values for score in scores])
    weights = np.array([score.weights for score in scores])
    parts = []
    for done in range(0, n_resamples, _CHUNK):
        size = min(_CHUNK, n_resamples - done)
        counts = generator.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
        parts.append((values @ counts.T) / np.maximum(weights @ counts.T, 1e-12))
    means = np.concatenate(parts, axis=1)
    return np.array([_shown(score.metric, mean) for score, mean in zip(scores, means)])


def report_rows(
    befores: Sequence[Score],
    afters: Sequence[Score],
    seed: int = 0,
    constants: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One row per score, and one for the mean accuracy of each group with several tasks.

    Args:
        befores: of the base model.
        afters: of the tuned one, in any order.
        seed: of the bootstrap.
        constants: task → accuracy of its best constant answer.

    Returns:
        Rows as :func:`budwood.tune.evaluate.scores.compare` gives them, targets first. Accuracies
        of tasks with a constant have a ``floor``: the better of it and the base model.

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
        for before, after in mine:
            rows.append(compare(before, after, seed))
            if after.metric == "accuracy" and after.task in (constants or {}):
                rows[-1]["floor"] = max(before.value, (constants or {})[after.task])
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


def _shown(metric: str, mean: Any) -> Any:
    if metric != "perplexity":
        return mean
    return np.exp(np.minimum(mean, math.log(1e12)))
