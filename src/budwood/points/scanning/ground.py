"""The ground of a frame: a plane by RANSAC, and the hills around it by a morphological opening.

Functions on arrays of shape (n_points, 3) in metres, z up.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from budwood.optional import need
from budwood.points.io.cloud import Array

CELL = 0.5
"""Side of the squares in which the lowest point is looked for, metres."""
WINDOW = 10.0
"""Side of the opening, metres: what is narrower stands on the ground, what is wider is ground."""
AROUND, ALONG, LOW = 7, 3, 30
"""Points below the road, of reflections for example, lie deeper than 30 percent of the squares
around, over 7 squares along each axis, and over 7 by 3 of them either way: a ditch does not."""
STEEPEST = math.tan(math.radians(30))
"""Slope of the steepest plane that counts as ground."""
LEAST_FLAT, LEAST_POINTS = 0.15, 3
"""A frame has ground if nothing stands in this fraction of its squares of that many points."""
MOST_CELLS = 2000
"""Squares along an axis; larger scenes get larger squares."""
TRIALS = 200


@dataclass(frozen=True, eq=False)
class Ground:
    """The ground of a frame.

    Attributes:
        is_ground: which points are ground, shape (n_points,).
        height: z of the ground below each point, metres, shape (n_points,).
    """

    is_ground: NDArray[np.bool_]
    height: Array


def find_ground(xyz: Array, height: float = 0.2, seed: int = 0) -> Ground | None:
    """Find the ground, level, tilted or hilly.

    The lowest points in squares of the map are what may be ground. scikit-learn's RANSAC puts a
    plane through them, which takes out a tilt of the sensor. Single squares that lie deeper than
    those around are passed over: a few points below the road would pull the ground down. An
    opening of the remaining heights by scipy follows hills and passes below objects.

    Source: the opening is that of Zhang et al., *A progressive morphological filter*, IEEE TGRS
    2003, with one window.

    Args:
        xyz: shape (n_points, 3), z up.
        height: points up to this far above the ground are ground, metres.
        seed: of RANSAC.

    Returns:
        None if there is no ground: something stands nearly everywhere.

    Raises:
        MissingPackageError: scikit-learn or scipy is not installed.
    """
    cells, shape, side = _cells(xyz[:, :2])
    lowest, highest = np.full(math.prod(shape), np.inf), np.full(math.prod(shape), -np.inf)
    np.minimum.at(lowest, cells, xyz[:, 2])
    np.maximum.at(highest, cells, xyz[:, 2])
    used = np.flatnonzero(np.isfinite(lowest))
    centers = np.stack(np.unravel_index(used, shape), axis=1).astype(np.float64) * side
    plane = _plane(centers, lowest[used], height, seed)
    if plane is None:
        return None
    relief = np.full(math.prod(shape), np.inf)
    relief[used] = lowest[used] - plane
    relief = _without_holes(relief.reshape(shape), height)
    surface = plane + _opened(relief, side)[used]
    clear = np.bincount(cells)[used] >= LEAST_POINTS
    if (highest[used] - surface < height)[clear].sum() < LEAST_FLAT * clear.sum():
        return None
    below = np.zeros(math.prod(shape))
    below[used] = surface
    below = below[cells]
    return Ground(xyz[:, 2] < below + height, below)


def _without_holes(relief: Array, depth: float) -> Array:
    """Heights of squares; those that lie deeper than most around become infinite.

    Args:
        relief: heights above the plane, metres, infinite where not known, shape (rows, columns).
        depth: how far a square may lie below those around, metres; see `AROUND`.
    """
    ndimage = need("scipy.ndimage", "removing the ground")
    nearest = ndimage.distance_transform_edt(
        np.isinf(relief), return_distances=False, return_indices=True
    )
    known = relief[tuple(nearest)]
    around = known
    for size in ((AROUND, 1), (1, AROUND)):  # much faster than both at once
        around = ndimage.percentile_filter(around, LOW, size)
    row, column = np.nonzero(relief < around - depth)
    is_hole = np.ones(len(row), dtype=bool)
    for size in ((AROUND, ALONG), (ALONG, AROUND)):
        padded = np.pad(known, [(side // 2, side // 2) for side in size], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, size)[row, column]
        low = np.percentile(windows.reshape(len(row), -1), LOW, axis=1) if len(row) else 0.0
        is_hole &= relief[row, column] < low - depth
    filled = relief.copy()
    filled[row[is_hole], column[is_hole]] = np.inf
    return filled


def _opened(relief: Array, side: float) -> Array:
    """Heights of squares after an opening; infinite ones are not known, and are passed over.

    Args:
        relief: heights above the plane, metres, shape (rows, columns).
        side: of the squares, metres.

    Returns:
        The largest surface that nowhere within a window is above the lowest height there, as a
        flat array.
    """
    ndimage = need("scipy.ndimage", "removing the ground")
    size = 2 * round(WINDOW / side / 2) + 1
    eroded = ndimage.minimum_filter(relief, size, mode="constant", cval=np.inf)
    eroded[np.isinf(eroded)] = -np.inf
    return ndimage.maximum_filter(eroded, size, mode="constant", cval=-np.inf).ravel()


def _cells(xy: Array) -> tuple[NDArray[np.int64], tuple[int, int], float]:
    """The square of each point, as a flat index, the shape of the map, and the squares' side."""
    low, extent = xy.min(axis=0), float(np.ptp(xy, axis=0).max())
    side = max(CELL, extent / MOST_CELLS)
    index = np.floor((xy - low) / side).astype(np.int64)
    rows, columns = (int(i) for i in index.max(axis=0) + 1)
    return index[:, 0] * columns + index[:, 1], (rows, columns), side


def _plane(centers: Array, lowest: Array, height: float, seed: int) -> Array | None:
    """Heights of the plane through the lowest points, at each of the squares.

    Args:
        centers: x and y of the squares, metres, shape (n, 2).
        lowest: z of their lowest points, shape (n,).
        height: points up to this far from the plane agree with it.
        seed: of RANSAC.
    """
    linear = need("sklearn.linear_model", "removing the ground")
    if len(np.unique(centers[:, 0])) < 3 or len(np.unique(centers[:, 1])) < 3:
        return None  # a wall or a line

    def is_level(model: object, *_: object) -> bool:
        return float(np.linalg.norm(model.coef_)) < STEEPEST  # type: ignore[attr-defined]

    fit = linear.RANSACRegressor(
        linear.LinearRegression(),
        min_samples=3,
        residual_threshold=height,
        max_trials=TRIALS,
        is_model_valid=is_level,
        random_state=seed,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of trials that few points agree with
            return fit.fit(centers, lowest).predict(centers)
    except ValueError:  # no three of the points give a level plane
        return None
