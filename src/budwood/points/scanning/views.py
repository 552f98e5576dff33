"""Pictures of frames: from above by matplotlib, and a page to turn in a browser by plotly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from budwood import optional
from budwood.errors import InputError, OutputError
from budwood.figures import new_figure, save_figure
from budwood.points.io.cloud import Array
from budwood.points.scanning.boxes import UNKNOWN, Box
from budwood.points.scanning.formats import ScannedFrame
from budwood.points.scanning.segments import GROUND, NO_CLUSTER, Segments

SHOWN = 60_000
"""Points shown at most."""
GREY, DARK = "#c8c8c8", "#666666"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4fb5", "#8c564b")
"""Of the labels, in the order in which they occur; those of Okabe and Ito first, which color-blind
people can tell apart."""
EDGES = (0, 1, 2, 3, 0, 4, 5, 6, 7, 4, None, 1, 5, None, 2, 6, None, 3, 7)
"""Corners of a box along its edges; None lifts the pen."""


def draw_from_above(frame: ScannedFrame, path: Path) -> None:
    """Draw a frame from above: points, boxes and labels.

    Args:
        frame: with its points.
        path: its suffix gives the format; an existing file is replaced.

    Raises:
        InputError: the frame has no points, since it was read from a folder.
        MissingPackageError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    segments = _segments(frame)
    wide, high = np.ptp(segments.cloud.xyz[:, :2], axis=0)
    figure = new_figure(10, float(np.clip(10 * high / max(wide, 1e-9), 3, 14)) + 0.6)
    axes = figure.add_subplot()
    for xyz, color in _layers(segments):
        axes.plot(xyz[:, 0], xyz[:, 1], ",", color=color)
    colors = _colors(frame)
    for box in frame.boxes:
        color = colors[box.label]
        outline = box.corners()[[0, 1, 2, 3, 0], :2]
        axes.plot(*outline.T, color=color, linewidth=1.2 if box.is_known else 0.6)
        if box.is_known:
            corner = outline[outline[:, 1].argmax()]
            said = f"{box.label} {box.score:.0%}"
            axes.annotate(said, corner, (0, 2), textcoords="offset points", fontsize=7, color=color)
    axes.set_aspect("equal")
    axes.set_xlabel("x, m")
    axes.set_ylabel("y, m")
    axes.set_title(title_of(frame), fontsize=10)
    save_figure(figure, path, dpi=130)


def write_page(frame: ScannedFrame, path: Path) -> None:
    """Write a frame as one HTML page to turn and zoom in a browser, without a server or network.

    Args:
        frame: with its points.
        path: of the page; an existing file is replaced.

    Raises:
        InputError: the frame has no points, since it was read from a folder.
        MissingPackageError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    figure = frame_figure(frame)
    try:
        figure.write_html(path, include_plotlyjs=True, full_html=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def frame_figure(frame: ScannedFrame) -> Any:
    """A frame in 3D, as a figure of plotly: points, boxes and labels.

    Args:
        frame: with its points.

    Raises:
        InputError: the frame has no points, since it was read from a folder.
        MissingPackageError: plotly is not installed.
    """
    segments = _segments(frame)
    graph = optional.need("plotly.graph_objects", "a 3D page")
    figure = graph.Figure()
    for xyz, color in _layers(segments):
        points = dict(zip("xyz", xyz.T.round(3).astype(np.float32)))
        marker = {"size": 1.2, "color": color}
        figure.add_scatter3d(
            **points, mode="markers", marker=marker, hoverinfo="skip", showlegend=False
        )
    for label, color in _colors(frame).items():
        shown = "legendonly" if label == UNKNOWN and frame.known else True
        boxes = [box for box in frame.boxes if box.label == label]
        figure.add_scatter3d(
            **dict(zip("xyz", _edges(boxes))),
            mode="lines",
            line={"color": color, "width": 3},
            name=f"{label} ({len(boxes)})",
            legendgroup=label,
            hoverinfo="skip",
            visible=shown,
        )
        figure.add_scatter3d(
            **dict(zip("xyz", np.array([_top(box) for box in boxes]).T)),
            mode="text",
            text=[f"{label} {box.score:.0%}" for box in boxes],
            textfont={"color": color},
            hovertext=[_said(box) for box in boxes],
            hoverinfo="text",
            legendgroup=label,
            showlegend=False,
            visible=shown,
        )
    scene = {"aspectmode": "data"} | {f"{axis}axis": {"title": f"{axis}, m"} for axis in "xyz"}
    figure.update_layout(title=title_of(frame), scene=scene, margin={"l": 0, "r": 0, "b": 0})
    return figure


def need_plotly() -> None:
    """Fail before slow work whose result is to be a page.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    optional.check("plotly", "a 3D page")


def title_of(frame: ScannedFrame) -> str:
    """The file's name and how many objects there are."""
    n_unknown = len(frame.boxes) - len(frame.known)
    return f"{Path(frame.source).name}: {len(frame.known)} objects, {n_unknown} unknown"


def _segments(frame: ScannedFrame) -> Segments:
    if frame.segments is None:
        raise InputError(
            f"{frame.source} has no points: it was finished in an earlier run; scan it into "
            "another folder to draw it"
        )
    return frame.segments


def _layers(segments: Segments) -> list[tuple[Array, str]]:
    """The ground, what is in no cluster, and the clusters, thinned evenly, with their colours."""
    step = -(-len(segments.cloud) // SHOWN)
    xyz, cluster = segments.cloud.xyz[::step], segments.cluster[::step]
    layers = (
        (cluster == GROUND, GREY),
        (cluster == NO_CLUSTER, DARK),
        (cluster >= 0, "black"),
    )
    return [(xyz[mask], color) for mask, color in layers]


def _colors(frame: ScannedFrame) -> dict[str, str]:
    """A colour for each label in the frame; unknown objects are grey."""
    labels = sorted({box.label for box in frame.known})
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    if len(frame.known) < len(frame.boxes):
        colors[UNKNOWN] = DARK
    return colors


def _edges(boxes: list[Box]) -> list[list[float | None]]:
    """x, y and z of the pen that draws boxes."""
    path: list[Any] = []
    for box in boxes:
        corners = box.corners().round(3).tolist()
        path += [[None] * 3 if i is None else corners[i] for i in (*EDGES, None)]
    return [[point[axis] for point in path] for axis in range(3)]


def _top(box: Box) -> Array:
    return np.array([*box.center[:2], box.center[2] + box.size[2] / 2 + 0.3])


def _said(box: Box) -> str:
    length, width, height = box.size
    track = "" if box.track is None else f"<br>object {box.track}"
    return (
        f"{box.label}, best {box.best} {box.score:.0%}, known {box.known:.0%}<br>"
        f"{length:.1f} × {width:.1f} × {height:.1f} m, {box.n_points} points{track}"
    )
