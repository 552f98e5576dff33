"""Sample points: at random, far apart, as a LiDAR sees them, or from one side; and normalise.

Functions on arrays, independent of any model. Randomness comes from a seed alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from budwood.checks import need_at_least, need_kind, need_seed
from budwood.errors import InputError
from budwood.points.axes import to_up
from budwood.points.io.cloud import REPEATED, Array, Cloud
from budwood.registry import Registry

Indices = NDArray[np.int64]
LEAST_EXTENT, MOST_EXTENT = 1e-15, 1e15
"""Range of a cloud's extent, in the units of the file, whose squares float32 can hold."""
FARTHEST_POOL = 65_536
"""Clouds above this many points are thinned to a point a voxel before farthest-point sampling."""
LIDAR_POOL = 131_072
"""The same before the simulation of a LiDAR."""
MOST_VOXELS = 1 << 20
"""Voxels along the longest side of a cloud at most."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""Spreads the bits of a key: 2⁶⁴ over the golden ratio."""


def random_points(xyz: Array, n_points: int, seed: int = 0) -> Indices:
    """Draw points without repetition; if there are no more than wanted, return all in order.

    Args:
        xyz: shape (n, 3).
        n_points: how many, 1 or more.
        seed: 0 or more; the same seed gives the same points.

    Returns:
        Sorted indices, shape (min(n, n_points),).
    """
    check_draw(n_points, seed)
    if len(xyz) <= n_points:
        return np.arange(len(xyz))
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(len(xyz), size=n_points, replace=False, shuffle=False))


def far_points(xyz: Array, n_points: int, seed: int = 0) -> Indices:
    """Pick points far apart, starting at a random one; arguments as in :func:`random_points`.

    Deviation: above `FARTHEST_POOL` points the cloud is thinned to a point a voxel first, at least
    four for each point wanted, since the cost grows with the product of n and ``n_points``.
    """
    import torch

    from budwood.points.grouping import farthest_points

    check_draw(n_points, seed)
    if len(xyz) <= n_points:
        return np.arange(len(xyz))
    pool = np.arange(len(xyz))
    if len(xyz) > FARTHEST_POOL:
        pool = voxel_points(xyz, max(FARTHEST_POOL // 4, 4 * n_points))
    if len(pool) < n_points:  # most points coincide
        return random_points(xyz, n_points, seed)
    start = int(np.random.default_rng(seed).integers(len(pool)))
    centred = torch.from_numpy(xyz[pool] - xyz[pool].mean(axis=0)).float()
    picked = farthest_points(centred[None], n_points, start=start)[0].numpy()
    return pool[picked]


def lidar_points(
    xyz: Array,
    n_points: int,
    seed: int = 0,
    *,
    beams: int = 64,
    elevation: tuple[float, float] = (-24.9, 2.0),
    azimuth_step: float = 0.2,
    up: str = "y",
) -> Indices:
    """Pick the points that a spinning LiDAR would return, about ``n_points`` of them.

    A simulation of ours, with the beams of a Velodyne HDL-64E. The object is put at the distance
    at which it gives that many returns. In each cell of beam and azimuth, the nearest point is
    seen. Unlike random samples, the points lie in lines and on the near side. Above `LIDAR_POOL`
    points, the cloud is thinned to a point a voxel first.

    Args:
        xyz: shape (n, 3); its extent counts as 1.5 m, about that of furniture.
        n_points: returns wanted, 1 or more; the result has between 1 and this many.
        seed: of the direction of view.
        beams: number of beams.
        elevation: lowest and highest beam, degrees; the object is in the middle of the beams.
        azimuth_step: angle between shots, degrees.
        up: the axis that points up, in ``AXES``.
    """
    check_draw(n_points, seed)
    rng = np.random.default_rng(seed)
    pool = voxel_points(xyz, LIDAR_POOL // 2) if len(xyz) > LIDAR_POOL else np.arange(len(xyz))
    points = to_up(xyz[pool], up, "z")
    points = points - points.mean(axis=0)
    extent = float(np.ptp(points, axis=0).max())
    points = points * (1.5 / extent if extent > 0 else 1.0)
    angle = rng.uniform(0, 2 * math.pi)
    heading = np.array([math.cos(angle), math.sin(angle), 0.0])
    steps = (math.radians(elevation[1] - elevation[0]) / max(1, beams - 1), azimuth_step)
    low, high = 2.0, 2000.0
    distance = low
    for _ in range(24):  # returns fall with distance: bisection on its logarithm
        middle = math.sqrt(low * high)
        cells, _ = _shots(points + heading * middle, steps)
        if len(np.unique(cells)) > n_points:
            low = middle
        else:
            distance = high = middle
    seen = pool[_first_returns(points + heading * distance, steps)]
    if len(seen) > n_points:
        seen = seen[random_points(xyz[seen], n_points, seed)]
    return seen


def visible_points(xyz: Array, n_points: int, seed: int = 0, *, hidden: float = 0.5) -> Indices:
    """Draw points at random from the side that faces a viewer.

    Args:
        xyz: shape (n, 3).
        n_points: how many at most, 1 or more.
        seed: of the direction of view and of the draw.
        hidden: fraction of the points, farthest from the viewer, that is left out, in [0, 1).
    """
    check_draw(n_points, seed)
    if not 0 <= hidden < 1:
        raise InputError(f"hidden={hidden} is outside [0, 1)")
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=3)
    depth = xyz @ (direction / np.linalg.norm(direction))
    n_seen = max(1, math.ceil((1 - hidden) * len(xyz)))
    seen = np.sort(np.argsort(depth, kind="stable")[:n_seen])
    return seen[random_points(xyz[seen], n_points, seed)]


SAMPLERS = Registry(
    "sampler",
    {
        "random": "budwood.points.sampling:random_points",
        "farthest": "budwood.points.sampling:far_points",
        "lidar": "budwood.points.sampling:lidar_points",
        "occluded": "budwood.points.sampling:visible_points",
    },
)


def sample(cloud: Cloud, n_points: int, method: str = "random", seed: int = 0) -> Cloud:
    """Sample a cloud to at most ``n_points`` points, with their colours.

    Raises:
        UnknownNameError: no such method in ``SAMPLERS``.
        InputError: ``n_points`` is below 1, or ``seed`` below 0.
    """
    need_kind(Cloud, "Cloud, such as read() gives", cloud=cloud)
    return cloud.take(SAMPLERS.get(method)(cloud.xyz, n_points, seed))


def without_duplicates(cloud: Cloud) -> Cloud:
    """Keep the first of all points at the same place; ``assumed.dropped`` counts the others."""
    return cloud.without(repeated_points(cloud.xyz), REPEATED)


def repeated_points(xyz: Array) -> NDArray[np.bool_]:
    """Which points are at the place of an earlier one, shape (n,).

    Args:
        xyz: shape (n, 3).
    """
    bits = (np.asarray(xyz, dtype=np.float64) + 0.0).view(np.uint64)  # −0 and 0 are one place
    keys = np.zeros(len(bits), dtype=np.uint64)
    for column in bits.T:
        keys = (keys ^ column) * _ODD
        keys ^= keys >> np.uint64(32)
    order = np.argsort(keys)  # one sort of integers, and not of rows
    ranked = xyz[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    repeats = np.ones(len(order), dtype=bool)
    repeats[np.minimum.reduceat(order, np.flatnonzero(starts))] = False
    return repeats


def voxel_points(xyz: Array, least: int) -> Indices:
    """Thin a cloud: keep the first point in each voxel that has any.

    The voxels are cubes. They are made smaller until ``least`` of them have points, or, where
    points coincide, until there are `MOST_VOXELS` along the longest side.

    Args:
        xyz: shape (n, 3).
        least: points to keep at least, if there are so many places.

    Returns:
        Sorted indices.
    """
    low, extent = xyz.min(axis=0), float(np.ptp(xyz, axis=0).max())
    if extent == 0 or len(xyz) <= least:
        return np.arange(len(xyz)) if extent else np.zeros(1, dtype=np.int64)
    along = round(least ** (1 / 3)) + 1
    while True:
        index = ((xyz - low) * (along / extent)).astype(np.int64).clip(max=along - 1)
        keys = (index[:, 0] * along + index[:, 1]) * along + index[:, 2]
        n_used = len(np.unique(keys))
        if n_used >= least or along == MOST_VOXELS:
            return np.sort(np.unique(keys, return_index=True)[1])
        # The points of a surface are in a number of voxels that grows with the square.
        along = min(MOST_VOXELS, math.ceil(along * max(1.3, math.sqrt(least / n_used))))


def normalize(cloud: Cloud) -> Cloud:
    """Move the centroid to the origin and scale the largest norm to 1.

    A cloud without extent is only moved.
    """
    centred = cloud.xyz - cloud.xyz.mean(axis=0)
    radius = float(np.linalg.norm(centred, axis=1).max())
    return replace(cloud, xyz=centred / radius if radius > 0 else centred)


def check_draw(n_points: int, seed: int, least: int = 1) -> None:
    """Refuse a number of points or a seed that sampling cannot use.

    Args:
        n_points: how many points.
        seed: of the draw.
        least: the fewest points allowed.

    Raises:
        InputError: too few points, a seed that generators do not take, or not an integer.
    """
    need_at_least(least, n_points=n_points)
    need_seed(seed)


def check_extent(cloud: Cloud) -> None:
    """Refuse coordinates whose squares overflow or vanish.

    Raises:
        InputError: the cloud's extent is outside ``LEAST_EXTENT`` and ``MOST_EXTENT``.
    """
    with np.errstate(over="ignore"):
        extent = float(np.ptp(cloud.xyz, axis=0).max())
    if not LEAST_EXTENT <= extent <= MOST_EXTENT:
        raise InputError(
            f"{cloud.source} extends over {extent:.3g} units; give lengths between "
            f"{LEAST_EXTENT:g} and {MOST_EXTENT:g}, and look for damaged coordinates"
        )


def _shots(points: Array, steps: tuple[float, float]) -> tuple[Indices, Array]:
    """The number of the shot (beam and azimuth) that hits each point, and the distance of it."""
    distance = np.linalg.norm(points, axis=1)
    polar = np.arcsin((points[:, 2] / np.maximum(distance, 1e-9)).clip(-1, 1))
    rows = np.floor(polar / steps[0])
    columns = np.floor(np.degrees(np.arctan2(points[:, 1], points[:, 0])) / steps[1])
    width = columns.max() - columns.min() + 1
    return (rows * width + columns).astype(np.int64), distance


def _first_returns(points: Array, steps: tuple[float, float]) -> Indices:
    """The nearest point of each shot that hits one."""
    shots, distance = _shots(points, steps)
    order = np.lexsort((distance, shots))
    first = np.ones(len(order), dtype=bool)
    first[1:] = shots[order[1:]] != shots[order[:-1]]
    return np.sort(order[first])
