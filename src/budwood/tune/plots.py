"""Pictures of a comparison, and of where an adapter sends text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from budwood.errors import InputError
from budwood.figures import new_figure, save_figure

Row = dict[str, Any]

KL = {
    "kl_chat": "KL to the base model on its replies, nats a token",
    "kl_text": "KL to the base model on text, nats a token",
}
"""Divergences by preference, with their labels: there may be no replies."""


def plot_front(rows: Sequence[Row], path: Path) -> Path:
    """Learning against forgetting, a point a learning rate, a line a method.

    Lines to runs that know less than the base model lead out of the picture.

    Args:
        rows: of all runs; those of the sweep count.
        path: the picture.

    Raises:
        InputError: the runs have neither a divergence nor a perplexity in common.
    """
    methods = _by_method(rows)
    labels = _kl_of([row for group in methods.values() for row in group])
    if all("perplexity" in row for group in methods.values() for row in group):
        labels["perplexity"] = "perplexity"
    if not labels:
        raise InputError("no picture of forgetting: the runs were measured on no text")
    figure, axes = _figure(len(labels))
    base = next((row for row in rows if row["method"] == "base"), None)
    for axis, (key, label) in zip(axes, labels.items()):
        for method, group in methods.items():
            points = sorted(group, key=lambda row: row["lr"])
            xs, ys = [row[key] for row in points], [row["validation"] for row in points]
            axis.plot(xs, ys, marker="o", label=method)
            for row in points:
                place = (row[key], row["validation"])
                axis.annotate(f"{row['lr']:g}", place, fontsize=6, annotation_clip=True)
        if base is not None:
            axis.axhline(base["validation"], linestyle="--", color="grey", linewidth=1)
        axis.set_xlabel(label)
        axis.set_xscale("log")
        _frame(axis, key, [row for group in methods.values() for row in group], base)
    axes[0].set_ylabel("accuracy on validation questions")
    axes[0].legend(fontsize=7)
    return save_figure(figure, path)


def plot_curves(histories: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Accuracy, the loss of right answers, and divergence over steps.

    Args:
        histories: method → history of a run, with probes.
        path: the picture.
    """
    probes = {
        method: [(row["step"], row["probe"]) for row in history if row.get("probe")]
        for method, history in histories.items()
    }
    labels = {"validation": "accuracy on validation questions"}
    labels["validation_loss"] = "loss of their right answers, nats a token"
    labels |= _kl_of([probe for points in probes.values() for _, probe in points])
    figure, axes = _figure(len(labels))
    for method, points in probes.items():
        for axis, key in zip(axes, labels if points else ()):
            axis.plot(*zip(*((step, one[key]) for step, one in points)), marker=".", label=method)
    for axis, label in zip(axes, labels.values()):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    return save_figure(figure, path)


def plot_identity(rows: Sequence[Row], path: Path) -> Path:
    """Identity share by layer, a line a kind of text.

    Args:
        rows: from :func:`budwood.tune.evaluate.suite.routing_rows`.
        path: the picture.
    """
    figure, axes = _figure(2)
    texts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        texts[row["text"]].append(row)
    for text, group in texts.items():
        layers = [row["layer"] for row in group]
        for axis, key in zip(axes, ("identity_share", "distance")):
            axis.plot(layers, [row[key] for row in group], marker=".", label=text)
    for axis, label in zip(axes, ("weight on identity experts", "standardised distance")):
        axis.set_xlabel("layer")
        axis.locator_params(axis="x", integer=True)
        axis.set_ylabel(label)
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=7)
    return save_figure(figure, path)


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs of the sweep, those of each method with its first seed."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == "base" or row.get("status") != "complete":
            continue
        group = found.setdefault(row["method"], [])
        if all(row["lr"] != other["lr"] for other in group):
            group.append(row)
    return found


def _frame(axis: Any, key: str, rows: Sequence[Row], base: Row | None) -> None:
    """Show the runs that know as much as the base model does, if there are any."""
    least = -math.inf if base is None else base["validation"]
    shown = [row for row in rows if row["validation"] >= least and row[key] > 0]
    if shown:
        xs, ys = [row[key] for row in shown], [row["validation"] for row in shown]
        axis.set_xlim(min(xs) / 1.15, max(xs) * 1.25)
        axis.set_ylim(max(least, min(ys) - 0.1) - 0.01, max(ys) + 0.02)


def _kl_of(rows: Sequence[Row]) -> dict[str, str]:
    """The first divergence that all rows have, with its label; none if there is none."""
    key = next((key for key in KL if all(key in row for row in rows)), None)
    return {key: KL[key]} if key else {}


def _figure(n_axes: int) -> tuple[Any, Any]:
    figure = new_figure(5.2 * n_axes, 4.0)
    return figure, figure.subplots(1, n_axes, squeeze=False)[0]
