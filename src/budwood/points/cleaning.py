"""Points that belong to no object: strays far from the rest, and the ground.

Functions on clouds, independent of file formats and of any model. Ours, in front of the encoders,
which scale a cloud by its farthest point.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from budwood.checks import need_kind
from budwood.errors import InputError
from budwood.optional import need
from budwood.points.axes import to_up
from budwood.points.io.cloud import Array, Cloud
from budwood.points.io.units import METRES
from budwood.points.sampling import random_points

STRAY, GROUND = "stray", "ground"
"""Reasons in ``Assumed.dropped``."""

BULK = 0.9
"""Fraction of the points, nearest to the middle, that says how large the object is."""
FAR, FAR_IF_SPARSE, SPARSE = 3.0, 6.0, 50
"""In units of the radius of the bulk: nearer to the middle than this, no point is stray. Of a car
seen from behind, few returns come from the front: sparse clouds of up to so many points get more
room."""
FEW = 0.02
"""Fraction of the points that a group of strays has at most."""
FEWEST = 12
"""Points below which there is no telling what is stray."""
ANCHORS = 20_000
"""Points of the bulk that groups are linked to at most."""

FITTED = 20_000
"""Points that the ground is fitted to at most."""
STEEPEST = 0.35
"""Slope of the ground at most, rise over run."""
BELOW = 0.03
"""Fraction of the points that may lie below the ground."""
THICKNESS_M = 0.15
THICKNESS = 0.02
"""How far from the plane points count as ground at most: in metres, or as a fraction of the extent.
On a smooth ground it is three standard deviations."""
FLAT = 0.45
"""Spread of the ground's heights at most, in units of the thickness. Walls have 0.58."""
SIGMA = 1.4826
"""Median absolute deviations in a standard deviation."""
LEAST_GROUND = 0.05
"""Fraction of the points that the ground has at least."""
LEAST_ABOVE = 0.01
"""Fraction of the points that stand on the ground at least; the rest is noise."""


def without_strays(cloud: Cloud, seed: int = 0) -> Cloud:
    """Leave out small groups of points that lie far from the rest.

    A group is stray if it has at most one point or `FEW` of all, and lies farther from the middle
    than `FAR` times the radius of the bulk, with a gap as wide as that radius between. What is
    linked to the bulk by shorter steps stays, such as the pole of a lamp.

    Args:
        cloud: one object, or a scene.
        seed: of the draw of `ANCHORS` in large clouds.
    """
    need_kind(Cloud, "Cloud, such as read() gives", cloud=cloud)
    n_points = len(cloud)
    if n_points < FEWEST:
        return cloud
    distance = np.linalg.norm(cloud.xyz - np.median(cloud.xyz, axis=0), axis=1)
    radius = float(np.quantile(distance, BULK))
    far = FAR + (FAR_IF_SPARSE - FAR) * min(1.0, SPARSE / n_points)
    outside = np.flatnonzero(distance > far * radius)
    if radius == 0 or not len(outside):
        return cloud
    inside = np.flatnonzero(distance <= far * radius)
    anchors = inside[random_points(cloud.xyz[inside], ANCHORS, seed)]
    # The spacing of that many points on a sphere of this radius, twice over.
    gap = radius * max(1.0, 7 / np.sqrt(n_points))
    groups = _linked(cloud.xyz[np.concatenate([anchors, outside])], gap)
    sizes = np.bincount(groups)
    bulk = np.unique(groups[: len(anchors)])
    mine = groups[len(anchors) :]
    small = sizes[mine] <= max(1, int(FEW * n_points))
    stray = np.zeros(n_points, dtype=bool)
    stray[outside[small & ~np.isin(mine, bulk)]] = True
    return cloud.without(stray, STRAY)


def without_ground(cloud: Cloud, up: str, seed: int = 0) -> Cloud:
    """Leave out the ground: the lowest large plane that is nearly level.

    The plane is found by RANSAC (scikit-learn's ``RANSACRegressor``) among those with next to no
    points below. If there is none, the cloud stays whole, and says so in ``assumed.notes``.

    Args:
        cloud: an object on some ground, or a scene.
        up: the axis that points up, in ``AXES``.
        seed: of RANSAC.

    Raises:
        InputError: nothing is left.
        MissingPackageError: scikit-learn is not installed.
    """
    need_kind(Cloud, "Cloud, such as read() gives", cloud=cloud)
    points = to_up(cloud.xyz, up, "z")
    extent = np.ptp(np.quantile(points, (0.01, 0.99), axis=0), axis=0).max()
    metre = METRES.get(cloud.assumed.units or "")
    thickness = THICKNESS_M / metre if metre else THICKNESS * float(extent)
    fitted = points[random_points(points, FITTED, seed)]
    plane = _level_plane(fitted, thickness, seed) if thickness > 0 else None
    if plane is None:
        return cloud.noting("no ground was found, and nothing was removed")
    ground = points[:, 2] <= points[:, :2] @ plane.slope + plane.height + plane.roughness
    if len(cloud) - ground.sum() < max(2, LEAST_ABOVE * len(cloud)):
        raise InputError(f"{cloud.source}: nothing is left above the ground; leave it in")
    return cloud.without(ground, GROUND)


class _Plane(NamedTuple):
    """A plane: ``slope`` in x and y, ``height`` at the origin, and how far its points lie off."""

    slope: Array
    height: float
    roughness: float


def _level_plane(points: Array, thickness: float, seed: int) -> _Plane | None:
    """The lowest nearly level plane; None if there is none."""
    need("sklearn", "removing the ground")
    from sklearn.linear_model import LinearRegression, RANSACRegressor

    middle = points.mean(axis=0)  # map coordinates would lose precision
    flat, height = (points - middle)[:, :2], (points - middle)[:, 2]

    def is_lowest(model: LinearRegression, *_: object) -> bool:
        level = np.linalg.norm(model.coef_) <= STEEPEST
        return bool(level and (height < model.predict(flat) - thickness).mean() <= BELOW)

    low = height <= np.median(height)  # so that three points of the ground are drawn often enough
    search = RANSACRegressor(
        min_samples=3,
        residual_threshold=thickness,
        max_trials=500,
        is_model_valid=is_lowest,
        random_state=seed,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of trials that are no plane
            search.fit(flat[low], height[low])
    except ValueError:  # no trial is valid
        return None
    near = np.abs(height - search.predict(flat)) <= thickness
    plane = LinearRegression().fit(flat[near], height[near])
    rest = height[near] - plane.predict(flat[near])
    if near.mean() < LEAST_GROUND or rest.std() > FLAT * thickness:
        return None
    centre = np.median(rest)  # what stands on the ground pulls the mean up
    spread = float(np.median(np.abs(rest - centre)) * SIGMA)
    offset = plane.intercept_ + middle[2] - middle[:2] @ plane.coef_ + centre
    return _Plane(plane.coef_, float(offset), float(np.clip(3 * spread, thickness / 5, thickness)))


def _linked(points: Array, gap: float) -> NDArray[np.int64]:
    """Number of the group of each point: points in cells of this width that touch are linked."""
    need("scipy", "looking for stray points")
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    cells, cell = np.unique(np.floor(points / gap), axis=0, return_inverse=True)
    pairs = KDTree(cells).query_pairs(1.5, p=np.inf, output_type="ndarray")
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(cells), len(cells)))
    _, groups = connected_components(links, directed=False)
    return groups[cell.ravel()]
