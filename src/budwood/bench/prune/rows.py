"""The table of a comparison: one row per method and budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from budwood.bench.prune.accuracy import FULL, Asked, Config, Outcome
from budwood.bench.prune.times import Run
from budwood.bootstrap import PairedBootstrap, interval, ratio
from budwood.sprout.questions import KINDS

Row = dict[str, Any]

GROUPS: dict[str, Callable[[Asked], bool]] = {
    "": lambda one: True,
    "salient": lambda one: one.question.asks_salient,
    "other": lambda one: not one.question.asks_salient,
}
"""The whole, questions whose object is the salient one, and the rest."""


def rows_of(outcome: Outcome, config: Config) -> list[Row]:
    """Rows of a record: ``full`` and ``blind``, then each method at each budget.

    Every row has ``method, keep, question, n_visual, n_kept``; ``accuracy``, ``retention``
    (accuracy over that with all tokens) and ``difference`` (to the reference at the same budget, in
    accuracy), each with ``_low`` and ``_high``; ``accuracy_full``; the same for the groups
    ``salient`` and ``other``; ``accuracy_KIND`` for each kind of question; and the times. What
    cannot be told, such as the difference of a baseline, is None.
    """
    draws = PairedBootstrap([one.scene for one in outcome.asked], config.n_resamples, config.seed)
    return [_row(run, outcome, config, draws) for run in config.runs]


def counts(outcome: Outcome) -> dict[str, int]:
    """Questions in all, in each group and of each kind."""
    found = {"n_questions": len(outcome.asked)}
    for group, belongs in GROUPS.items():
        if group:
            found[f"n_{group}"] = sum(map(belongs, outcome.asked))
    for kind in KINDS:
        found[f"n_{kind}"] = sum(one.question.kind == kind for one in outcome.asked)
    return found


def _row(run: Run, outcome: Outcome, config: Config, draws: PairedBootstrap) -> Row:
    time = outcome.times[run]
    row: Row = {
        "method": run.method,
        "keep": 1.0 if run.keep is None else run.keep,
        "question": run.variant.question if run.variant else None,
        "n_visual": _mean(outcome.n_visual),
        "n_kept": _mean(outcome.n_kept[run]),
    }
    for group, belongs in GROUPS.items():
        row |= _scores(run, outcome, config, draws, group, belongs)
    for kind in KINDS:
        mine = [one.question.kind == kind for one in outcome.asked]
        row[f"accuracy_{kind}"] = _share(outcome.right[run], mine)
    return row | {
        "ttft_ms": round(time.first.total_ms, 3),
        "ttft_full_ms": round(outcome.times[FULL].first.total_ms, 3),
        "speedup": round(time.speedup, 4),
        "encode_ms": round(time.first.encode_ms, 3),
        "select_ms": round(time.first.select_ms, 3),
        "prefill_ms": round(time.first.prefill_ms, 3),
    }


def _scores(
    run: Run,
    outcome: Outcome,
    config: Config,
    draws: PairedBootstrap,
    group: str,
    belongs: Callable[[Asked], bool],
) -> Row:
    """Accuracy, retention and difference in one group of questions, with intervals."""
    mine = [belongs(one) for one in outcome.asked]
    other = config.reference_run(run.keep) if run.variant else None
    own, full = outcome.right[run], outcome.right[FULL]
    resampled = draws.accuracies(own, mine)
    accuracy, accuracy_full = _share(own, mine), _share(full, mine)
    retention = accuracy / accuracy_full if accuracy is not None and accuracy_full else None
    values: dict[str, Any] = {
        "accuracy": (accuracy, *interval(resampled)),
        "retention": (retention, *interval(ratio(resampled, draws.accuracies(full, mine)))),
        "difference": (None, None, None),
    }
    if other is not None and other != run and accuracy is not None:
        theirs = outcome.right[other]
        gap = accuracy - (_share(theirs, mine) or 0.0)
        values["difference"] = (gap, *interval(resampled - draws.accuracies(theirs, mine)))
    suffix = f"_{group}" if group else ""
    row: Row = {}
    for name, (value, low, high) in values.items():
        row |= {
            f"{name}{suffix}{end}": x for end, x in zip(("", "_low", "_high"), (value, low, high))
        }
    return row | {f"accuracy_full{suffix}": accuracy_full}


def _share(right: list[bool], mine: list[bool]) -> float | None:
    """Share of rights among those that count; None if there are none."""
    counted = [one for one, counts_ in zip(right, mine) if counts_]
    return sum(counted) / len(counted) if counted else None


def _mean(values: list[int]) -> int | float:
    mean = statistics.fmean(values)
    return int(mean) if mean.is_integer() else round(mean, 2)
