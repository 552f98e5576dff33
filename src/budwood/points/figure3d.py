"""A cloud as a figure of plotly, to turn in a browser."""

from __future__ import annotations

from typing import Any

import numpy as np

from budwood import optional
from budwood.points.io.cloud import Array
from budwood.points.picture import SHOWN


def cloud_figure(xyz: Array, title: str = "") -> Any:
    """Draw a cloud in 3D, coloured by height.

    Args:
        xyz: y up, shape (n_points, 3); of more than ``SHOWN`` points, evenly spread ones are drawn.
        title: above it.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    graph = optional.need("plotly.graph_objects", "a 3D picture")
    x, height, z = np.asarray(xyz[:: -(-len(xyz) // SHOWN)], dtype=np.float32).T
    marker = {
        "size": float(np.clip(90 / len(x) ** 0.5, 1.5, 7)),
        "color": height,
        "colorscale": "Viridis",
    }
    points = graph.Scatter3d(x=x, y=-z, z=height, mode="markers", marker=marker, hoverinfo="skip")
    figure = graph.Figure(points)
    axes = {f"{axis}axis": {"visible": False} for axis in "xyz"}
    margin = {"l": 0, "r": 0, "b": 0, "t": 40 if title else 0}
    figure.update_layout(title=title, scene={"aspectmode": "data", **axes}, margin=margin)
    return figure
