"""Draw clouds to picture files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from budwood.figures import new_figure, save_figure
from budwood.points.io.cloud import Array

SHOWN = 20_000
"""Points drawn of each cloud at most."""


def draw(clouds: Sequence[tuple[str, Array]], path: Path) -> None:
    """Draw clouds side by side, each under its title.

    Args:
        clouds: title and points of each: y up, shape (n_points, 3).
        path: its suffix gives the format; an existing file is replaced.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = new_figure(4.2 * len(clouds), 4.6)
    import mpl_toolkits.mplot3d  # noqa: F401  registers the projection

    for column, (title, xyz) in enumerate(clouds, 1):
        axes = figure.add_subplot(1, len(clouds), column, projection="3d")
        points = xyz[:: -(-len(xyz) // SHOWN)]
        x, height, z = points.T
        size = min(max(600 // len(points), 1), 25)
        axes.scatter(x, -z, height, c=height, s=size, cmap="viridis", depthshade=True)
        axes.set_title(title, fontsize=10)
        axes.set_aspect("equal")  # type: ignore[arg-type]
        axes.set_axis_off()
        axes.view_init(elev=18, azim=-60)  # type: ignore[attr-defined]
    save_figure(figure, path, dpi=130)
