"""The table of a comparison: one row per method and budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from budwood.bench.prune.accuracy import Asked, Outcome
from budwood.bench.prune.earlier import identity, pack
from budwood.bench.prune.plan import FULL, Config, Run
from budwood.bootstrap import PairedBootstrap, interval, ratio
from budwood.sprout.questions import KINDS
from budwood.sprout.scenes import Box

Row = dict[str, Any]

GROUPS: dict[str, Callable[[Asked], bool]] = {
    "": lambda asked: True,
    "salient": lambda asked: asked.question.asks_salient,
    "other": lambda asked: not asked.question.asks_salient,
}
"""All questions, those about the salient object, and the rest."""

SIZES: dict[str, Callable[[float], bool]] = {
    "small": lambda side: side < 60,
    "medium": lambda side: 60 <= side < 110,
    "large": lambda side: side >= 110,
}
"""Questions by the shorter side of the smallest thing that has to be seen, frame and digit
included, in px."""


def rows_of(outcome: Outcome, config: Config) -> list[Row]:
    """Make the rows of a record: ``full`` and ``blind``, then each method at each budget.

    Every row has ``method, keep, question, positions, resolved, n_visual, n_kept``; ``accuracy``,
    ``retention`` (accuracy over that with all tokens) and ``difference`` (to the reference at the
    same budget, in accuracy), ``question_difference`` (to the same method with the first choice of
    question), each with ``_low`` and ``_high``; ``accuracy_full``; the same for the groups
    ``salient`` and ``other``; ``accuracy_KIND`` for each kind of question; ``accuracy_SIZE`` for
    each of ``SIZES``; ``best``, the best other method at the same budget, and ``best_difference``
    to it; the times; and ``right``, the answers, for comparisons that take them over. What is not
    known, such as the difference of a baseline, is None.
    """
    draws = PairedBootstrap(
        [asked.scene for asked in outcome.asked], config.n_resamples, config.seed
    )
    return [_row(run, outcome, config, draws) for run in config.runs]


def counts(outcome: Outcome) -> dict[str, int]:
    """Count questions: all, in each group, of each kind and size."""
    numbers = {"n_questions": len(outcome.asked)}
    for group, belongs in GROUPS.items():
        if group:
            numbers[f"n_{group}"] = sum(map(belongs, outcome.asked))
    for name, belongs in _parts().items():
        numbers[f"n_{name}"] = sum(map(belongs, outcome.asked))
    return numbers


def _parts() -> dict[str, Callable[[Asked], bool]]:
    """Questions of each kind and size."""
    parts: dict[str, Callable[[Asked], bool]] = {
        kind: lambda asked, kind=kind: asked.question.kind == kind for kind in KINDS
    }
    for size, fits in SIZES.items():
        parts[size] = lambda asked, fits=fits: (
            bool(asked.question.boxes) and fits(min(map(_shorter_side, asked.question.boxes)))
        )
    return parts


def _shorter_side(box: Box) -> int:
    left, top, right, bottom = box
    return min(right - left, bottom - top)


def _row(run: Run, outcome: Outcome, config: Config, draws: PairedBootstrap) -> Row:
    time, best = outcome.times[run], _best_other(run, outcome, config)
    row: Row = {
        **identity(run),
        "n_visual": _mean(outcome.n_visual),
        "n_kept": _mean(outcome.n_kept[run]),
        "best": best.method if best else None,
    }
    for group, belongs in GROUPS.items():
        row |= _scores(run, best, outcome, config, draws, group, belongs)
    for name, belongs in _parts().items():
        counted = [belongs(asked) for asked in outcome.asked]
        row[f"accuracy_{name}"] = _accuracy(outcome.right[run], counted)
    return row | {
        "ttft_ms": round(time.first.total_ms, 3),
        "ttft_full_ms": round(outcome.times[FULL].first.total_ms, 3),
        "speedup": round(time.speedup, 4),
        "encode_ms": round(time.first.encode_ms, 3),
        "select_ms": round(time.first.select_ms, 3),
        "prefill_ms": round(time.first.prefill_ms, 3),
        "right": pack(outcome.right[run]),
    }


def _scores(
    run: Run,
    best: Run | None,
    outcome: Outcome,
    config: Config,
    draws: PairedBootstrap,
    group: str,
    belongs: Callable[[Asked], bool],
) -> Row:
    """Accuracy, retention and difference in one group of questions, with intervals."""
    counted = [belongs(asked) for asked in outcome.asked]
    right, full = outcome.right[run], outcome.right[FULL]
    resampled = draws.accuracies(right, counted)
    accuracy, accuracy_full = _accuracy(right, counted), _accuracy(full, counted)
    retention = accuracy / accuracy_full if accuracy is not None and accuracy_full else None
    values: dict[str, Any] = {
        "accuracy": (accuracy, *interval(resampled)),
        "retention": (retention, *interval(ratio(resampled, draws.accuracies(full, counted)))),
    }
    others = {
        "difference": config.reference_run(run.keep) if run.variant else None,
        "question_difference": config.first_question(run),
        "best_difference": best,
    }
    for name, other in others.items():
        values[name] = (None, None, None)
        if other is not None and other != run and accuracy is not None:
            theirs = outcome.right[other]
            gap = accuracy - (_accuracy(theirs, counted) or 0.0)
            values[name] = (gap, *interval(resampled - draws.accuracies(theirs, counted)))
    suffix = f"_{group}" if group else ""
    row: Row = {}
    for name, (value, low, high) in values.items():
        row |= {
            f"{name}{suffix}{end}": x for end, x in zip(("", "_low", "_high"), (value, low, high))
        }
    return row | {f"accuracy_full{suffix}": accuracy_full}


def _best_other(run: Run, outcome: Outcome, config: Config) -> Run | None:
    """The other method with most right answers at the budget of this one; None for a baseline."""
    others = [
        other
        for other in config.runs
        if run.variant and other.keep == run.keep and other.method != run.method
    ]
    return max(others, key=lambda other: sum(outcome.right[other]), default=None)


def _accuracy(right: list[bool], counted: list[bool]) -> float | None:
    """Fraction of correct answers among those that count; None if none counts."""
    n_counted = sum(counted)
    return sum(map(all, zip(right, counted))) / n_counted if n_counted else None


def _mean(values: Sequence[float]) -> int | float:
    mean = statistics.fmean(values)
    return int(mean) if mean.is_integer() else round(mean, 2)
