"""Cut a frame into ground, clusters and the rest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import Array, Cloud
from budwood.points.scanning.config import ScanConfig
from budwood.points.scanning.ground import Ground, find_ground

FLATTEN = 0.5
"""Heights count half where clusters are made: beams of a LiDAR are farther apart than its shots."""
VOXELS = 3
"""Voxels along the largest gap in a cluster; clusters are made of voxels."""
MOST_VOXELS = 2.0**62
"""Voxels that can be numbered."""
NEAR, MOST_GROWTH = 15.0, 2.0
"""From this distance on, metres, the largest gap grows in proportion, as the distance between shots
does, up to so many times."""
NO_CLUSTER = -1
GROUND = -2


@dataclass(frozen=True, eq=False)
class Segments:
    """A frame cut into ground, clusters and the rest.

    Attributes:
        cloud: the points in range, z up.
        cluster: the cluster of each point, 0 the largest; −1 in none, −2 on the ground. Shape
            (n_points,).
        ground: None if it was not looked for, or there is none.
        n_clusters: clusters in ``cluster``.
        notices: what a person should know of, such as that there is no ground.
    """

    cloud: Cloud
    cluster: NDArray[np.int64]
    ground: Ground | None
    n_clusters: int
    notices: tuple[str, ...] = ()

    def members(self) -> list[NDArray[np.int64]]:
        """The indices of the points of each cluster."""
        order = np.argsort(self.cluster, kind="stable")
        bounds = np.searchsorted(self.cluster[order], np.arange(self.n_clusters + 1))
        return [order[a:b] for a, b in itertools.pairwise(bounds)]


def segment(cloud: Cloud, config: ScanConfig) -> Segments:
    """Crop a frame, remove the ground, and cluster what stands on it.

    Args:
        cloud: a frame, z up, metres, the sensor at the origin.
        config: how.

    Raises:
        InputError: no point is in range.
        MissingPackageError: scikit-learn or scipy is not installed.
    """
    cloud = in_range(cloud, config.min_range, config.max_range)
    notices: list[str] = []
    ground = None
    if config.ground:
        ground = find_ground(cloud.xyz, config.ground_height, config.seed)
        if ground is None:
            notices.append("no ground was found, and none removed")
    stands = np.arange(len(cloud)) if ground is None else np.flatnonzero(~ground.is_ground)
    grows = config.max_range is not None or sensor_is_near(cloud.xyz)
    labels = cluster_points(cloud.xyz[stands], config.gap, config.min_points, grows)
    labels, n_long, n_flat = _without_long(cloud.xyz[stands], labels, config.max_size)
    if n_flat:
        notices.append(f"clusters with all points at one place, left out: {n_flat}")
    n_found = int(labels.max(initial=-1)) + 1
    if n_long:
        notices.append(f"clusters longer than {config.max_size:g} m, left out: {n_long}")
    if n_found == 0:
        notices.append(f"no cluster has {config.min_points} points")
    if n_found > config.max_clusters:
        notices.append(
            f"the {config.max_clusters:,} clusters of most points are named, of {n_found:,}"
        )
        labels[labels >= config.max_clusters] = NO_CLUSTER
    cluster = np.full(len(cloud), GROUND)
    cluster[stands] = labels
    return Segments(cloud, cluster, ground, min(n_found, config.max_clusters), tuple(notices))


def in_range(cloud: Cloud, min_range: float, max_range: float | None) -> Cloud:
    """The points within two horizontal distances from the origin; None keeps all that are far.

    Raises:
        InputError: there are none.
    """
    away = np.hypot(cloud.xyz[:, 0], cloud.xyz[:, 1])
    inside = (away > min_range) & (away <= (np.inf if max_range is None else max_range))
    if not inside.any():
        low, high = cloud.xyz[:, :2].min(axis=0), cloud.xyz[:, :2].max(axis=0)
        limit = "" if max_range is None else f" to {max_range:g}"
        raise InputError(
            f"{cloud.source} has no point at {min_range:g}{limit} m from the sensor, which is at "
            f"the origin: x spans {low[0]:g} to {high[0]:g} and y {low[1]:g} to {high[1]:g}; give "
            "another range, none for files in map coordinates, or the unit (--units) if it is "
            "not metres"
        )
    return cloud if inside.all() else cloud.take(np.flatnonzero(inside))


def sensor_is_near(xyz: Array) -> bool:
    """Whether the sensor can be at the origin: no farther from the points than these extend.

    In map coordinates the origin is kilometres away.

    Args:
        xyz: shape (n, 3), n ≥ 1.
    """
    low, high = xyz[:, :2].min(axis=0), xyz[:, :2].max(axis=0)
    away = np.linalg.norm(np.clip(0.0, low, high))
    return bool(away <= (high - low).max())


def cluster_points(
    xyz: Array, gap: float, min_points: int, grows: bool = True
) -> NDArray[np.int64]:
    """Cluster points by single linkage: points at most ``gap`` apart are in one cluster.

    The same as DBSCAN with ``min_samples=1`` on voxels of a third of the gap, by scipy's k-d tree
    and connected components. Heights count half, and the gap grows from `NEAR` on.

    Args:
        xyz: shape (n, 3), metres.
        gap: largest gap within a cluster near the sensor, metres.
        min_points: smaller clusters are left out.
        grows: whether the gap grows with the distance from the origin, where the sensor is.

    Returns:
        The cluster of each point, −1 for none; cluster 0 has most points, and of equally large
        ones the first point decides. Shape (n,).
    """
    if len(xyz) == 0:
        return np.empty(0, dtype=np.int64)
    spatial = need("scipy.spatial", "clustering")
    sparse, graph = need("scipy.sparse", "clustering"), need("scipy.sparse.csgraph", "clustering")
    centers, voxel = voxels(xyz * (1, 1, FLATTEN), gap / VOXELS)
    distance = np.hypot(centers[:, 0], centers[:, 1]) if grows else np.zeros(len(centers))
    growth = np.clip(distance / NEAR, 1.0, MOST_GROWTH)
    pairs = spatial.cKDTree(centers).query_pairs(gap * growth.max(), output_type="ndarray")
    apart = np.linalg.norm(centers[pairs[:, 0]] - centers[pairs[:, 1]], axis=1)
    pairs = pairs[apart <= gap * growth[pairs].min(axis=1)]
    links = sparse.coo_matrix(
        (np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), (len(centers),) * 2
    )
    _, part = graph.connected_components(links, directed=False)
    return _by_size(part[voxel], min_points)


def voxels(xyz: Array, side: float) -> tuple[Array, NDArray[np.int64]]:
    """Put points into cubes.

    Args:
        xyz: shape (n, 3).
        side: of the cubes.

    Returns:
        The mean of the points in each used cube, shape (n_used, 3), and the cube of each point,
        shape (n,).

    Raises:
        InputError: the points are so far apart that cubes cannot be numbered.
    """
    extent = np.ptp(xyz, axis=0)
    if np.prod(extent / side + 1) > MOST_VOXELS:
        raise InputError(
            f"the frame extends over {extent.max():.3g} m, which is too far for clusters; give a "
            "range, or look for damaged coordinates"
        )
    index = np.floor((xyz - xyz.min(axis=0)) / side).astype(np.int64)
    shape = index.max(axis=0) + 1
    keys = (index[:, 0] * shape[1] + index[:, 1]) * shape[2] + index[:, 2]
    used, voxel = np.unique(keys, return_inverse=True)
    counts = np.bincount(voxel, minlength=len(used))
    sums = [np.bincount(voxel, column, minlength=len(used)) for column in xyz.T]
    return np.stack(sums, axis=1) / counts[:, None], voxel


def _by_size(part: NDArray[np.integer], min_points: int) -> NDArray[np.int64]:
    """Number parts by size, the largest 0, and those of too few points −1."""
    _, first, part, counts = np.unique(
        part, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort((first, -counts))
    number = np.full(len(counts), NO_CLUSTER)
    kept = order[counts[order] >= min_points]
    number[kept] = np.arange(len(kept))
    return number[part]


def _without_long(
    xyz: Array, labels: NDArray[np.int64], max_size: float
) -> tuple[NDArray[np.int64], int, int]:
    """Leave out clusters that extend farther than a length along x or y, or not at all.

    Returns:
        The new labels, and how many clusters were too long, and without extent.
    """
    n_clusters = int(labels.max(initial=-1)) + 1
    inside = labels >= 0
    low, high = np.full((n_clusters, 3), np.inf), np.full((n_clusters, 3), -np.inf)
    np.minimum.at(low, labels[inside], xyz[inside])
    np.maximum.at(high, labels[inside], xyz[inside])
    extent = high - low
    long = extent[:, :2].max(axis=1, initial=0) > max_size
    flat = extent.max(axis=1, initial=0) == 0
    kept = ~(long | flat)
    number = np.append(np.where(kept, np.cumsum(kept) - 1, NO_CLUSTER), NO_CLUSTER)
    return number[labels], int(long.sum()), int(flat.sum())
