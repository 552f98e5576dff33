"""Time to first token of everything that is compared, side by side on the same questions."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from budwood.bench.prune.variants import Variant
from budwood.prune.chat import prepare
from budwood.prune.latency import FirstToken, generate_timed
from budwood.prune.session import attach
from budwood.timing import side_by_side


@dataclass(frozen=True)
class Run:
    """One row of a comparison: a baseline, or a variant at a budget.

    Attributes:
        baseline: its name, ``"full"`` or ``"blind"``; empty for a variant.
        variant: how tokens are chosen; None for a baseline.
        keep: the budget, as in ``attach``; None for a baseline.
    """

    baseline: str
    variant: Variant | None = None
    keep: int | float | None = None

    @property
    def method(self) -> str:
        """The name of the baseline or variant."""
        return self.variant.name if self.variant else self.baseline


@dataclass(frozen=True)
class Times:
    """Medians over the timed questions, and the median of the ratio to all tokens.

    Attributes:
        first: each part by itself.
        speedup: time to first token with all tokens, divided by this one's.
    """

    first: FirstToken
    speedup: float


def measure(
    model: Any,
    processor: Any,
    runs: Sequence[Run],
    questions: Sequence[tuple[Image.Image, str]],
    blank: Callable[[Image.Image], Image.Image],
) -> dict[Run, Times]:
    """Time each run on each question, one at a time, encoder included.

    Args:
        model: the model, with nothing attached.
        processor: its processor.
        runs: what to time; one of them is ``Run("full")``.
        questions: pictures and questions.
        blank: makes the picture that the blind baseline sees.
    """

    def time_one(run: Run, number: int) -> FirstToken:
        image, text = questions[number]
        image = blank(image) if run.baseline == "blind" else image
        inputs = prepare(processor, [image], [text], model.device)
        if run.variant is None:
            return generate_timed(model, inputs, max_new_tokens=1).first
        options: dict[str, Any] = {**run.variant.options, "keep": run.keep, "timing": True}
        with attach(model, processor=processor, **options) as session:
            return generate_timed(model, inputs, session, max_new_tokens=1).first

    named = {str(i): functools.partial(time_one, run) for i, run in enumerate(runs)}
    found = side_by_side(named, len(questions))
    times = {run: found[str(i)] for i, run in enumerate(runs)}
    full = next(times[run] for run in runs if run.baseline == "full")
    return {
        run: Times(
            FirstToken.median(own),
            statistics.median(all_.total_ms / one.total_ms for all_, one in zip(full, own)),
        )
        for run, own in times.items()
    }
