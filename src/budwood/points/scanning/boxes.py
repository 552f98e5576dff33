"""Boxes around clusters, upright and turned about the vertical axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from budwood.optional import need
from budwood.points.io.cloud import Array

UNKNOWN = "unknown"
LEAST_SIDE = 0.01
"""Sides of a box are this long at least, metres."""
ABOVE_GROUND = 0.6
"""A box reaches down to the ground if its cluster begins this far above it at most, metres: the
lowest points of an object are removed with the ground."""


@dataclass(frozen=True)
class Shape:
    """An upright box.

    Attributes:
        center: x, y, z of its middle, metres, z up.
        size: length, width and height, metres; the length is the longer horizontal side.
        yaw: angle of the length from the x axis about z, radians, in (−π/2, π/2]. Which end is
            the front is not known.
    """

    center: tuple[float, float, float]
    size: tuple[float, float, float]
    yaw: float

    def corners(self) -> Array:
        """The corners, those of the bottom first, each four in a circle, shape (8, 3)."""
        length, width, height = (side / 2 for side in self.size)
        flat = np.array([[length, width], [-length, width], [-length, -width], [length, -width]])
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        turned = flat @ np.array([[c, s], [-s, c]]) + self.center[:2]
        levels = (self.center[2] - height, self.center[2] + height)
        return np.concatenate([np.column_stack([turned, np.full(4, z)]) for z in levels])


@dataclass(frozen=True)
class Box(Shape):
    """An object in a frame.

    Attributes:
        label: one of the labels given, or ``"unknown"``.
        score: probability of the best label, among all labels and those of the background.
        known: probability of the labels given together; below the threshold the object is unknown.
        best: the best of the labels given, also where the object is unknown.
        n_points: points of its cluster in this frame.
        n_used: points that it was named from, more than ``n_points`` where frames are accumulated.
        track: number of the object over frames; None without poses.
    """

    label: str
    score: float
    known: float
    best: str
    n_points: int
    n_used: int
    track: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether it has one of the labels given."""
        return self.label != UNKNOWN


def fit_box(xyz: Array, ground: float | None = None) -> Shape:
    """The smallest upright box around a cluster, by trimesh.

    Args:
        xyz: shape (n_points, 3), metres, z up.
        ground: height of the ground below it.

    Raises:
        MissingPackageError: trimesh or scipy is not installed.
    """
    middle, length, width, yaw = _rectangle(xyz[:, :2])
    bottom, top = float(xyz[:, 2].min()), float(xyz[:, 2].max())
    if ground is not None and bottom - ground <= ABOVE_GROUND:
        bottom = min(bottom, ground)
    sides = (length, width, top - bottom)
    size = tuple(max(float(side), LEAST_SIDE) for side in sides)
    return Shape((*middle, (bottom + top) / 2), size, yaw)  # type: ignore[arg-type]


def _rectangle(xy: Array) -> tuple[tuple[float, float], float, float, float]:
    """Middle, longer side, shorter side and angle of the smallest rectangle around points."""
    bounds, spatial = (
        need("trimesh.bounds", "fitting boxes"),
        need("scipy.spatial", "fitting boxes"),
    )
    low, high = xy.min(axis=0), xy.max(axis=0)
    origin = (low + high) / 2
    try:
        turn, (length, width) = bounds.oriented_bounds_2D(xy - origin)
    except (spatial.QhullError, ValueError):  # points on a line, or fewer than three
        return _line(xy)
    x, y = origin - turn[:2, :2].T @ turn[:2, 2]
    return (float(x), float(y)), float(length), float(width), upright_yaw(*turn[0, :2])


def _line(xy: Array) -> tuple[tuple[float, float], float, float, float]:
    """The same for points on a line, or all at one place."""
    along = xy[:, np.ptp(xy, axis=0).argmax()]
    low, high = xy[along.argmin()], xy[along.argmax()]
    x, y = (low + high) / 2
    step = high - low
    return (float(x), float(y)), float(np.hypot(*step)), 0.0, upright_yaw(*step)


def upright_yaw(x: float, y: float) -> float:
    """The angle of a direction without front and back, radians, in (−π/2, π/2]."""
    angle = math.atan2(y, x)
    if angle > math.pi / 2:
        return angle - math.pi
    return angle if angle > -math.pi / 2 else angle + math.pi
