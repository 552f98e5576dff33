"""Rows of the table: one per run, and one per method over the seeds of its final runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from budwood.bench.tune.plan import Trial
from budwood.errors import InputError
from budwood.records import Row
from budwood.tune.evaluate.divergence import CHAT
from budwood.tune.evaluate.scores import Score, mean_of

AVERAGED = (
    "target",
    "target_loss",
    "target_floor",
    "target_over_floor",
    "validation",
    "general",
    "general_loss",
    "perplexity",
    "text_loss_rise",
    "kl_chat",
    "kl_text",
    "train_loss",
    "train_seconds",
)
"""Columns that are averaged over seeds; each gets a ``_std`` as well."""

OF_TASKS = ("accuracy", "loss", "floor", "gain")
"""Columns of single tasks begin with one of these; a gain is over the floor."""

FORGETTING = {
    "perplexity_rise": ("perplexity", "perplexity_before"),
    "general_loss_rise": ("general_loss", "general_loss_before"),
    "general_drop": ("general_before", "general"),
}
"""Column → what is subtracted from what."""


def method_rows(rows: Sequence[Row], baseline: str = "lora") -> list[Row]:
    """One row per method: means and standard deviations over seeds, and forgetting over LoRA's.

    Args:
        rows: of all runs, of which those marked ``final`` count.
        baseline: method that ``…_ratio`` columns divide by.
    """
    finals: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("final") and row.get("status") == "complete":
            finals.setdefault(row["method"], []).append(row)
    found = [_mean_row(group) for group in finals.values()]
    base, against = (
        next((row for row in found if row["method"] == name), {}) for name in ("base", baseline)
    )
    for row in found:
        rises = {
            key.replace("loss_", "loss_rise_", 1): row[key] - base[key]
            for key in _of_tasks("loss", row)
            if key in base
        }
        row |= rises
        for key in (*FORGETTING, *rises, "text_loss_rise", "kl_chat", "kl_text"):
            row[f"{key}_ratio"] = _ratio(row.get(key), against.get(key))
    return found


def _mean_row(group: Sequence[Row]) -> Row:
    first = group[0]
    row: Row = {key: first[key] for key in ("method", "lr", "rank", "params")}
    row["n_seeds"] = len(group)
    for key in AVERAGED:
        values = [one[key] for one in group if one.get(key) is not None]
        row[key] = statistics.fmean(values) if values else None
        row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    for name, (more, less) in FORGETTING.items():
        gaps = [one[more] - one[less] for one in group if more in one and less in one]
        row[name] = statistics.fmean(gaps) if gaps else None
    if row["target"] is not None:
        row["target_gain"] = row["target"] - first["target_before"]
    tasks = [key for metric in OF_TASKS for key in _of_tasks(metric, first)]
    return row | {key: statistics.fmean(one[key] for one in group) for key in tasks}


def _of_tasks(metric: str, row: Row) -> list[str]:
    """Columns with a score of a single task, without those of validation."""
    return sorted(key for key in row if key.startswith(f"{metric}_") and "_val_" not in key)


def _ratio(part: float | None, whole: float | None) -> float | None:
    if part is None or whole is None or abs(whole) < 1e-9:
        return None
    return part / whole


def first_finals(rows: Sequence[Row]) -> dict[str, Trial]:
    """The first complete final run of each method."""
    found: dict[str, Trial] = {}
    for row in rows:
        if row.get("final") and row["method"] != "base" and row.get("status") == "complete":
            found.setdefault(row["method"], Trial(row["method"], row["lr"], row["seed"]))
    return found


def best_rates(rows: Mapping[Trial, Row]) -> dict[str, float]:
    """The learning rate of each method that does best on validation data.

    A tie goes to the lower loss, and then to the lower rate.

    Raises:
        InputError: all runs of all methods diverged.
    """
    best: dict[str, tuple[tuple[float, float, float], float]] = {}
    for trial, row in rows.items():
        if row.get("status") != "complete":
            continue
        key = (-row["validation"], row["validation_loss"], trial.lr)
        if trial.method not in best or key < best[trial.method][0]:
            best[trial.method] = (key, trial.lr)
    if not best:
        raise InputError("every run diverged; give lower learning rates")
    return {method: lr for method, (_, lr) in best.items()}


def summary(
    befores: Sequence[Score], afters: Sequence[Score], constants: Mapping[str, float] | None = None
) -> Row:
    """Columns of a row: of each task, and means over target, validation and general tasks.

    Args:
        befores: of the base model.
        afters: of the tuned one.
        constants: target → accuracy of its best constant answer.
    """
    known = {score.key: score for score in befores}
    tests = [score for score in afters if not score.task.startswith("val_")]
    row: Row = {}
    for score in afters:
        row[f"{score.metric}_{score.task}"] = score.value
    groups = {
        "validation": [s for s in afters if s.task.startswith("val_")],
        "target": [s for s in tests if s.group == "target"],
        "general": [s for s in tests if s.group == "general"],
    }
    for name, scores in groups.items():
        for metric, suffix in (("accuracy", ""), ("loss", "_loss")):
            mine = [score for score in scores if score.metric == metric]
            if mine:
                base = [known[score.key] for score in mine]
                row[f"{name}{suffix}"] = mean_of(name, mine)
                row[f"{name}{suffix}_before"] = mean_of(name, base)
    gains = []
    for score in groups["target"]:
        if score.metric == "accuracy" and score.task in (constants or {}):
            floor = max(known[score.key].value, (constants or {})[score.task])
            row[f"floor_{score.task}"] = floor
            row[f"gain_{score.task}"] = score.value - floor
            gains.append((floor, score.value - floor))
    if gains:
        row["target_floor"], row["target_over_floor"] = map(statistics.fmean, zip(*gains))
    for score in afters:
        if score.metric == "perplexity":
            name = "perplexity" if score.task != CHAT else "perplexity_of_replies"
            before = known[score.key].value
            row[name], row[f"{name}_before"] = score.value, before
            if score.task != CHAT:  # what PEFT's method_comparison calls forgetting
                row["text_loss_rise"] = math.log(score.value) - math.log(before)
        if score.metric == "kl":
            row["kl_chat" if score.task == CHAT else "kl_text"] = score.value
    return row
