"""Accuracies with intervals from a bootstrap over scenes, paired between all that is compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95

Floats = NDArray[np.float64]


class PairedBootstrap:
    """Resamples scenes, and draws the same ones for everything that is compared.

    Scenes and not questions are drawn, as questions about one picture stand and fall together.

    Args:
        scenes: scene of each question, numbered from 0, shape (n_questions,).
        n_resamples: how often.
        seed: of the draws.
    """

    def __init__(self, scenes: Sequence[int], n_resamples: int, seed: int) -> None:
        self.scenes = np.asarray(scenes)
        n_scenes = int(self.scenes.max()) + 1
        generator = np.random.default_rng(seed)
        shares = np.full(n_scenes, 1 / n_scenes)
        self._draws = generator.multinomial(n_scenes, shares, size=n_resamples).astype(float)

    def accuracies(self, right: Sequence[bool], counted: Sequence[bool]) -> Floats:
        """Accuracy in each resample, shape (n_resamples,); NaN in one without any question.

        Args:
            right: whether each question was answered rightly, shape (n_questions,).
            counted: which questions count, same shape.
        """
        counts = np.asarray(counted, dtype=float)
        return ratio(self._drawn(np.asarray(right) * counts), self._drawn(counts))

    def _drawn(self, per_question: Floats) -> Floats:
        n_scenes = self._draws.shape[1]
        per_scene = np.bincount(self.scenes, per_question, minlength=n_scenes)
        return self._draws @ per_scene.astype(float)


def interval(values: Floats) -> tuple[float, float] | tuple[None, None]:
    """The central interval of ``LEVEL``; None where no value is finite."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return None, None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def ratio(part: Floats, whole: Floats) -> Floats:
    """``part / whole``, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
