"""Frames of a simulated LiDAR on a road: ground, cars, people, poles and walls made of boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
HEIGHT = 1.73
"""Of the sensor above the ground, metres."""
FARTHEST = 80.0
CAR = ((4.2, 1.8, 0.9, 0.25), (2.2, 1.6, 0.6, 1.15))
PERSON = ((0.35, 0.5, 0.85, 0.0), (0.3, 0.6, 0.65, 0.85), (0.25, 0.2, 0.25, 1.5))
POLE = ((0.2, 0.2, 5.0, 0.0),)
PARTS = {"car": CAR, "pedestrian": PERSON, "pole": POLE}
"""Boxes of each kind: length, width, height, and the height of the bottom above the ground."""


@dataclass(frozen=True)
class Placed:
    """An object on the road.

    Attributes:
        kind: a key of ``PARTS``, or ``"wall"``.
        x: metres, forward.
        y: metres, to the left.
        yaw: radians.
        length: of a wall, metres.
    """

    kind: str
    x: float
    y: float
    yaw: float = 0.0
    length: float = 30.0

    def parts(self) -> Sequence[tuple[float, float, float, float]]:
        """Its boxes."""
        return ((self.length, 0.4, 4.0, 0.0),) if self.kind == "wall" else PARTS[self.kind]


def street(seed: int = 0, n_cars: int = 12, n_people: int = 8, n_poles: int = 10) -> list[Placed]:
    """Objects on both sides of a road, far enough apart, and a wall on each side."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(["car"] * n_cars + ["pedestrian"] * n_people + ["pole"] * n_poles)
    placed = [Placed("wall", 0.0, side * 14.0, 0.0, 90.0) for side in (-1, 1)]
    for i, kind in enumerate(kinds.tolist()):
        side, step = (-1) ** i, 6.0 * (i // 2) - 42.0
        y = side * (4.0 if kind == "car" else 9.0) + rng.uniform(-0.5, 0.5)
        placed.append(Placed(kind, step + rng.uniform(-0.5, 0.5), y, rng.uniform(-0.2, 0.2)))
    return placed


def sweep(
    scene: Sequence[Placed],
    *,
    beams: int = 64,
    shots: int = 2000,
    at: tuple[float, float] = (0.0, 0.0),
    slope: float = 0.0,
    ground: bool = True,
    seed: int = 0,
) -> tuple[Array, NDArray[np.int64]]:
    """One turn of a LiDAR with the elevations of a Velodyne HDL-64E.

    Args:
        scene: what is there.
        beams: from −24.9° to 2°.
        shots: in a turn; 64 × 2,000 beams give some 120,000 points.
        at: where the sensor is, metres; its frame is turned as the scene's.
        slope: of the road along x.
        ground: whether there is one.
        seed: of the noise of 1 cm along each ray.

    Returns:
        Points in the sensor's frame, shape (n, 3), and the index of the object of each, −1 for the
        ground, shape (n,).
    """
    up, turn = np.radians(np.linspace(-24.9, 2.0, beams)), np.arange(shots) * 2 * math.pi / shots
    up, turn = (grid.ravel() for grid in np.meshgrid(up, turn, indexing="ij"))
    rays = np.stack([np.cos(up) * np.cos(turn), np.cos(up) * np.sin(turn), np.sin(up)], axis=1)
    down = rays[:, 2] - slope * rays[:, 0]
    with np.errstate(divide="ignore"):
        nearest = np.where(ground & (down < 0), -HEIGHT / down, np.inf)
    hit = np.full(len(rays), -1)
    for index, one in enumerate(scene):
        for length, width, height, bottom in one.parts():
            foot = bottom - HEIGHT + slope * (one.x - at[0])
            middle = np.array([one.x - at[0], one.y - at[1], foot + height / 2])
            distance = _reach(rays, middle, np.array([length, width, height]), one.yaw)
            hit[distance < nearest] = index
            nearest = np.minimum(nearest, distance)
    seen = nearest < FARTHEST
    noise = np.random.default_rng(seed).normal(scale=0.01, size=int(seen.sum()))
    return rays[seen] * (nearest[seen] + noise)[:, None], hit[seen]


def _reach(rays: Array, middle: Array, size: Array, yaw: float) -> Array:
    """How far rays from the origin get to a box; infinity where they miss it.

    The slab method: a ray is inside the box while it is between all three pairs of its sides.
    """
    c, s = math.cos(yaw), math.sin(yaw)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    with np.errstate(divide="ignore"):
        inverse = 1 / (rays @ turn.T)
    near, far = (turn @ middle + sign * size / 2 for sign in (-1, 1))
    a, b = near * inverse, far * inverse
    enters, leaves = np.minimum(a, b).max(axis=1), np.maximum(a, b).min(axis=1)
    return np.where((enters <= leaves) & (enters > 0), enters, np.inf)
