"""Plots of benchmark records: words and units on the axes, and a label at the end of each curve."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from budwood.errors import InputError
from budwood.figures import new_figure, save_figure
from budwood.records import is_finite

Row = Mapping[str, Any]

KL = {
    "kl_chat": "divergence from the base model\non its replies, nats per token",
    "kl_text": "divergence from the base model\non text, nats per token",
}
"""Divergences, the preferred one first, with their axis labels. A run may have no replies."""

WORDS = KL | {
    "accuracy": "accuracy, %",
    "retention": "accuracy kept, % of that with all tokens",
    "n_kept": "visual tokens kept",
    "keep": "fraction of visual tokens kept",
    "points": "points in a cloud",
    "unseen_top1": "top-1 accuracy on unseen classes, %",
    "seen_top1": "top-1 accuracy on seen classes, %",
    "novel_top1": "top-1 accuracy on novel classes, %",
    "validation": "accuracy on validation questions, %",
    "validation_loss": "loss of right answers, nats per token",
    "perplexity": "perplexity of text",
    "step": "training step",
    "layer": "layer",
    "identity_share": "routing weight on identity experts, %",
    "distance": "distance from the training data,\nstandard deviations",
    "target": "answers of the tasks",
    "chat": "replies of the base model",
    "wikitext2_valid": "WikiText",
}
"""Axis labels and names in words. A label that ends in "%" stands for a fraction in the rows."""

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6A3D9A", "#8C564B")
_MARKERS = "osD^vPX*"  # another marker for each round of colours, so that 64 curves differ
# References that are not methods: nothing adapted, or chance.
_PLAIN = {"random": "#444444", "uniform": "#888888", "frozen": "#444444", "tokens": "#888888"}
_FONT: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
_LABEL = 0.2  # height of the label of a curve, inches
_BELOW = 0.9  # room for the horizontal axis and its label, inches
_NEXT_TICK = 1.15  # least ratio of two ticks of a logarithmic axis


def plot_lines(
    rows: Iterable[Row],
    path: str | os.PathLike[str],
    *,
    x: str,
    y: str,
    by: str,
    low: str | None = None,
    high: str | None = None,
    baseline: float | None = None,
    baseline_label: str = "",
    log: bool = False,
) -> Path:
    """Draw one curve per group of rows, each with its name at the right end.

    Rows whose y is None are left out.

    Args:
        rows: dicts, such as ``record.rows``.
        path: the picture; its suffix gives the format. An existing file is replaced.
        x: key of the horizontal axis; ``WORDS`` has its label.
        y: key of the vertical axis.
        by: key whose values are the curves.
        low: key of the lower end of each interval around y.
        high: key of the upper end.
        baseline: a dashed line at this height, such as the accuracy with all tokens.
        baseline_label: what the dashed line is.
        log: a logarithmic horizontal axis, with ticks at the values that are not too close.

    Raises:
        InputError: matplotlib is not installed, or the rows lack a key or a number.
        OutputError: the file cannot be written.
    """
    rows = _with_numbers(rows, x, y, *(key for key in (low, high) if key))
    groups = _grouped(rows, by)
    figure, (axes,) = _figure(1, width=7.2, height=max(4.2, _BELOW + _LABEL * len(groups)))
    scale = _scale(y)
    ends: list[tuple[str, float, float, str]] = []
    for i, (name, group) in enumerate(groups.items()):
        colour, marker = _style(name, i)
        points = sorted(group, key=lambda row: row[x])
        xs = [row[x] * _dodge(i, len(groups), bool(log and low)) for row in points]
        ys = [row[y] * scale for row in points]
        axes.plot(xs, ys, marker=marker, markersize=5, color=colour, linewidth=1.6)
        if low and high:
            lows, highs = ([row[key] * scale for row in points] for key in (low, high))
            axes.vlines(xs, lows, highs, color=colour, alpha=0.4, linewidth=1.4)
        ends.append((name, xs[-1], ys[-1], colour))
    _label_axes(axes, x, y)
    if log:
        _log_ticks(axes, {row[x] for row in rows})
    if baseline is not None:
        axes.axhline(baseline * scale, linestyle="--", color="grey", linewidth=1)
        axes.margins(y=0.08)
        axes.text(
            0.01, baseline * scale, baseline_label, color="grey", va="bottom",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    _label_ends(axes, ends)
    return save_figure(figure, Path(path))


def plot_front(rows: Sequence[Row], path: Path) -> Path:
    """Draw learning against forgetting: a point for each learning rate, a line for each method.

    The frame shows the runs that learn at least half of what the best one does; lines to the
    others lead out of the picture.

    Args:
        rows: of all runs; those of the sweep count.
        path: the picture.

    Raises:
        InputError: no run is complete, or the runs have neither a divergence nor a perplexity in
            common.
    """
    methods = _sweep(rows)
    runs = [row for group in methods.values() for row in group]
    if not runs:
        raise InputError("no picture of forgetting: no run is complete")
    keys = _forgetting(runs)
    if not keys:
        raise InputError("no picture of forgetting: the runs were measured on no text")
    base = next((row for row in rows if row["method"] == "base"), None)
    markers = dict(zip(sorted({row["lr"] for row in runs}), _MARKERS))
    figure, axes = _figure(len(keys), width=4.0 * len(keys) + 2.0, height=4.0, shared=True)
    for axis, key in zip(axes, keys):
        for i, (method, group) in enumerate(methods.items()):
            points = sorted(group, key=lambda row: row["lr"])
            xs, ys = [row[key] for row in points], [100 * row["validation"] for row in points]
            axis.plot(xs, ys, color=_style(method, i)[0], linewidth=1.4, label=method)
            for row, px, py in zip(points, xs, ys):
                axis.plot(px, py, marker=markers[row["lr"]], color=_style(method, i)[0])
        _label_axes(axis, key, None)
        _frame(axis, key, runs, base)
    axes[0].set_ylabel(WORDS["validation"])
    _legend(figure, axes[0], markers)
    return save_figure(figure, path)


def has_front(rows: Sequence[Row]) -> bool:
    """Whether :func:`plot_front` can draw these runs."""
    if not all(isinstance(row, Mapping) for row in rows):
        return False
    runs = [row for group in _sweep(rows).values() for row in group]
    return bool(
        runs and _forgetting(runs) and all(is_finite(row.get("validation")) for row in runs)
    )


def plot_curves(histories: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draw accuracy, the loss of right answers, and divergence over training steps.

    Args:
        histories: method → history of a run, with probes.
        path: the picture.
    """
    probes = {
        method: [(row["step"], row["probe"]) for row in history if row.get("probe")]
        for method, history in histories.items()
    }
    keys = ["validation", "validation_loss"]
    keys += _kl_of([probe for points in probes.values() for _, probe in points])
    figure, axes = _figure(len(keys), width=3.6 * len(keys), height=3.5)
    for i, (method, points) in enumerate(probes.items()):
        colour, marker = _style(method, i)
        for axis, key in zip(axes, keys if points else ()):
            steps = [step for step, _ in points]
            values = [probe[key] * _scale(key) for _, probe in points]
            axis.plot(steps, values, marker=marker, markersize=4, color=colour, label=method)
    for axis, key in zip(axes, keys):
        _label_axes(axis, "step", key)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    return save_figure(figure, path)


def plot_identity(rows: Sequence[Row], path: Path) -> Path:
    """Draw, layer by layer, where SLIM sends each kind of text.

    Args:
        rows: from :func:`budwood.tune.evaluate.suite.routing_rows`.
        path: the picture.
    """
    figure, axes = _figure(2, width=9.6, height=3.8)
    for i, (text, group) in enumerate(_grouped(rows, "text").items()):
        colour, marker = _style(text, i)
        for axis, key in zip(axes, ("identity_share", "distance")):
            heights = [row[key] * _scale(key) for row in group]
            axis.plot(
                [row["layer"] for row in group], heights, marker=marker, markersize=4,
                color=colour, label=WORDS.get(text, text),
            )  # fmt: skip
    for axis, key in zip(axes, ("identity_share", "distance")):
        _label_axes(axis, "layer", key)
        axis.locator_params(axis="x", integer=True)
    axes[0].set_ylim(0, 102)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, path)


def _figure(n_axes: int, width: float, height: float, shared: bool = False) -> tuple[Any, Any]:
    figure = new_figure(width, height)
    from matplotlib import rc_context

    with rc_context(_FONT):
        axes = figure.subplots(1, n_axes, squeeze=False, sharey=shared)[0]
    for axis in axes:
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _style(name: str, place: int) -> tuple[str, str]:
    """Colour and marker of a curve; grey for references that are not methods."""
    colour = _PLAIN.get(name, _COLOURS[place % len(_COLOURS)])
    return colour, _MARKERS[(place + place // len(_COLOURS)) % len(_MARKERS)]


def _scale(key: str) -> float:
    """What a fraction is multiplied by: 100 where the label says %."""
    return 100.0 if "%" in WORDS.get(key, "") else 1.0


def _label_axes(axis: Any, x: str, y: str | None) -> None:
    axis.set_xlabel(WORDS.get(x, x.replace("_", " ")), fontsize=11)
    if y is not None:
        axis.set_ylabel(WORDS.get(y, y.replace("_", " ")), fontsize=11)


def _dodge(place: int, n_curves: int, apart: bool) -> float:
    """A factor close to 1 that keeps the intervals of several curves apart on a log axis."""
    return 1.012 ** (place - (n_curves - 1) / 2) if apart else 1.0


def _log_ticks(axis: Any, values: Iterable[float]) -> None:
    """A logarithmic axis with a tick at each value, or at one of several close together."""
    ticks: list[float] = []
    for value in sorted(values):
        if not ticks or value >= _NEXT_TICK * ticks[-1]:
            ticks.append(value)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,.0f}" if tick >= 100 else f"{tick:.3g}" for tick in ticks])
    axis.minorticks_off()


def _label_ends(axis: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each name beside the end of its curve, far enough from the next one."""
    bottom, top = axis.get_ylim()
    gap = _LABEL / (axis.figure.get_figheight() - _BELOW)
    heights = _spread([(y - bottom) / (top - bottom) for _, _, y, _ in ends], gap)
    transform = axis.get_yaxis_transform()  # x in widths of the axes, y in data
    for (name, x, y, colour), height in zip(ends, heights):
        place = bottom + height * (top - bottom)
        axis.annotate(
            name, xy=(x, y), xycoords="data", xytext=(1.03, place), textcoords=transform,
            color=colour, va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels apart, up and down alike, until no two are nearer than the gap.

    Args:
        heights: in heights of the axes; between 0 and 1 there is room.
        gap: likewise.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    clusters: list[tuple[float, int]] = []  # middle and number of labels that touch
    for i in order:
        clusters.append((_within(heights[i], 1, gap), 1))
        while len(clusters) > 1 and _touch(clusters[-2], clusters[-1], gap):
            (upper, n_upper), (lower, n_lower) = clusters.pop(), clusters.pop()
            number = n_upper + n_lower
            middle = (upper * n_upper + lower * n_lower) / number
            clusters.append((_within(middle, number, gap), number))
    spread = [
        middle + gap * (k - (number - 1) / 2) for middle, number in clusters for k in range(number)
    ]
    return [height for _, height in sorted(zip(order, spread))]


def _within(middle: float, number: int, gap: float) -> float:
    """The middle of some labels, moved so that all are between 0 and 1 if there is room."""
    half = gap * (number - 1) / 2
    return 0.5 if half > 0.5 else min(max(middle, half), 1 - half)


def _touch(below: tuple[float, int], above: tuple[float, int], gap: float) -> bool:
    return above[0] - below[0] < gap * (above[1] + below[1]) / 2 - 1e-9


def _legend(figure: Any, axis: Any, markers: Mapping[float, str]) -> None:
    """Methods by colour and learning rates by marker, right of the axes."""
    from matplotlib.lines import Line2D

    handles, labels = axis.get_legend_handles_labels()
    for rate, marker in markers.items():
        handles.append(Line2D([], [], color="#444444", linestyle="", marker=marker))
        labels.append(f"learning rate {rate:g}")
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=10)


def _frame(axis: Any, key: str, rows: Sequence[Row], base: Row | None) -> None:
    """Show the runs that learn at least half of what the best one does."""
    best = max(row["validation"] for row in rows)
    least = -math.inf if base is None else (base["validation"] + best) / 2
    shown = [row for row in rows if row["validation"] >= least and row[key] > 0]
    axis.set_xscale("log")
    if not shown:
        return
    xs, ys = [row[key] for row in shown], [100 * row["validation"] for row in shown]
    low, high = min(xs) / 1.15, max(xs) * 1.25
    axis.set_xlim(low, high)
    axis.set_ylim(min(ys) - 1.5, max(ys) + 1.5)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [m * 10.0**e for e in range(-6, 7) for m in steps if low <= m * 10.0**e <= high]
    if len(ticks) > 7:
        ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 3) if low <= m * 10.0**e <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def _sweep(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs of the sweep: of each method and learning rate, the one with the first seed."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == "base" or row.get("status") != "complete":
            continue
        group = methods.setdefault(row["method"], [])
        if all(row["lr"] != other["lr"] for other in group):
            group.append(row)
    return methods


def _forgetting(runs: Sequence[Row]) -> list[str]:
    """Keys of the measures of forgetting that all runs have."""
    has_perplexity = all(is_finite(row.get("perplexity")) for row in runs)
    return _kl_of(runs) + (["perplexity"] if has_perplexity else [])


def _kl_of(rows: Sequence[Row]) -> list[str]:
    """The first divergence that all rows have, in a list; an empty list if there is none."""
    return [key for key in KL if all(is_finite(row.get(key)) for row in rows)][:1]


def _with_numbers(rows: Iterable[Row], x: str, y: str, *others: str) -> list[Row]:
    """The rows that have a y, checked.

    Raises:
        InputError: a row lacks a key, a value is no finite number, or no row has a y.
    """
    kept = []
    for row in rows:
        for key in (x, y, *others):
            if key not in row:
                raise InputError(f"cannot plot: a row has no {key!r}")
        if row[y] is None:
            continue
        for key in (x, y, *others):
            value = row[key]
            if not is_finite(value):
                raise InputError(f"cannot plot {key!r}: it is {value!r} in a row, not a number")
        kept.append(row)
    if not kept:
        raise InputError(f"cannot plot {y!r}: no row has a value")
    return kept


def _grouped(rows: Iterable[Row], by: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row.get(by))].append(row)
    return dict(groups)
