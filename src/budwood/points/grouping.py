"""Cut clouds into local groups: farthest-point centres with nearest neighbours or balls.

Batched tensor functions that work from one point up, and the rule by which the number and size of
groups follow the number of points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from budwood.errors import InputError, ShapeError
from budwood.optional import is_installed

CHUNK = 1 << 24
"""Distances in memory at once when neighbours are searched by brute force."""
BALL_CHUNK = 1 << 18
"""The same when balls are searched."""
BALL_TREE_AFTER = 1 << 16
"""On a CPU, balls that have found too few of so many points are left to a k-d tree."""
ROUNDING = 1e-5
"""Relative error of float32 distances at most, for candidates among which they decide."""
SPARSE_POWER, SPARSE_OVERLAP = 0.4, 4.0
"""The rule for sparse clouds: the power of k, and the number of groups that a point is in. Chosen
on validation clouds, with sprout frozen."""
TREE_ABOVE = 4096
"""On a CPU, a k-d tree is faster than brute force from this many points on."""


@dataclass(frozen=True)
class Grouping:
    """How a cloud is cut into groups.

    Attributes:
        n_groups: groups of a dense cloud.
        k: points in each group.
        n_dense: points of a cloud in the encoder's training.
        radius: groups are balls of this radius; None: nearest neighbours.
        density_aware: for clouds of fewer than half of ``n_dense`` points, k falls with a power of
            their number, down to ``k_min``, and the number of groups falls so that a point is in
            several; ours. Off: the published numbers, cut to the number of points.
        k_min: smallest k of that rule.
        pointnet2: on dense clouds, reproduce ``pointnet2_ops`` exactly; see
            :func:`farthest_points_pointnet2`.
    """

    n_groups: int
    k: int
    n_dense: int
    radius: float | None = None
    density_aware: bool = True
    k_min: int = 4
    pointnet2: bool = False

    def __post_init__(self) -> None:
        for name in ("n_groups", "k", "n_dense", "k_min"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise InputError(f"radius={self.radius} must be positive")

    def is_sparse(self, n_points: int) -> bool:
        """Whether the rule for sparse clouds applies."""
        return self.density_aware and 2 * n_points < self.n_dense

    def sizes(self, n_points: int) -> tuple[int, int]:
        """Number of groups and of points in each, both between 1 and ``n_points``."""
        if not self.is_sparse(n_points):
            return min(self.n_groups, n_points), min(self.k, n_points)
        k = round(self.k * (2 * n_points / self.n_dense) ** SPARSE_POWER)
        k = min(max(k, self.k_min), self.k, n_points)
        # At the border to dense clouds as many groups as there.
        overlap = max(SPARSE_OVERLAP, 2 * self.n_groups * self.k / self.n_dense)
        return min(self.n_groups, n_points, math.ceil(overlap * n_points / k)), k

    def __call__(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """Choose centres and the members of their groups.

        Args:
            xyz: normalised coordinates, shape (batch, n_points, 3).

        Returns:
            Indices of the centres, shape (batch, n_groups), and of the members of their groups,
            shape (batch, n_groups, k), both int64. Centres are distinct unless ``pointnet2`` holds.
        """
        check_points(xyz)
        n_groups, k = self.sizes(xyz.shape[1])
        sparse = self.is_sparse(xyz.shape[1])
        quirks = self.pointnet2 and not sparse
        centers = (farthest_points_pointnet2 if quirks else farthest_points)(xyz, n_groups)
        queries = gather(xyz, centers)
        if self.radius is not None and not sparse:
            return centers, ball(xyz, queries, self.radius, k, strict=quirks)
        return centers, nearest(xyz, queries, k)


def check_points(xyz: Tensor) -> None:
    """Check that a tensor is a batch of clouds.

    Raises:
        ShapeError: the shape is not (batch, n_points ≥ 1, 3), or the dtype not floating-point.
    """
    if xyz.ndim != 3 or xyz.shape[2] != 3 or 0 in xyz.shape:
        raise ShapeError(
            f"xyz has shape {tuple(xyz.shape)}, expected (batch, n_points, 3), not empty"
        )
    if not xyz.is_floating_point():
        raise ShapeError(f"xyz has dtype {xyz.dtype}, expected a floating-point one")


def gather(values: Tensor, indices: Tensor) -> Tensor:
    """Select ``values[b, indices[b]]`` for each b.

    Args:
        values: shape (batch, n, channels).
        indices: int64, shape (batch, …).

    Returns:
        Shape (batch, …, channels).
    """
    flat = indices.flatten(1)
    picked = values.gather(1, flat[..., None].expand(-1, -1, values.shape[2]))
    return picked.view(*indices.shape, values.shape[2])


def farthest_points(xyz: Tensor, n_samples: int, start: int = 0) -> Tensor:
    """Farthest-point sampling: each next point is the farthest from those chosen before.

    Source: Eldar et al. 1997, Gonzalez 1985. Ties go to the lower index. Deviation from common
    code: no point is chosen twice, even among several at the same place.

    Args:
        xyz: shape (batch, n_points, 3).
        n_samples: 1 ≤ n_samples ≤ n_points.
        start: the first point, 0 ≤ start < n_points.

    Returns:
        Distinct indices in the order of choice, int64, shape (batch, n_samples).

    Raises:
        ShapeError: wrong shape, or numbers outside their range.
    """
    check_points(xyz)
    batch, n_points, _ = xyz.shape
    if not 1 <= n_samples <= n_points or not 0 <= start < n_points:
        raise ShapeError(f"{n_samples} samples from point {start} of {n_points}: out of range")
    axes = [axis.contiguous() for axis in xyz.detach().float().unbind(-1)]
    rows = torch.arange(batch, device=xyz.device)
    chosen = torch.empty(batch, n_samples, dtype=torch.long, device=xyz.device)
    last = torch.full((batch,), start, dtype=torch.long, device=xyz.device)
    distance = torch.full_like(axes[0], torch.inf)
    gap, spare = torch.empty_like(distance), torch.empty_like(distance)
    for i in range(n_samples):
        chosen[:, i] = last
        _square_gaps(axes, [axis[rows, last, None] for axis in axes], gap, spare)
        torch.minimum(distance, gap, out=distance)
        distance[rows, last] = -1.0  # never again, even if all others lie at one place
        last = distance.argmax(dim=1)
    return chosen


def farthest_points_pointnet2(xyz: Tensor, n_samples: int) -> Tensor:
    """Farthest-point sampling as ``pointnet2_ops`` does it on a GPU, choice by choice.

    It starts at point 0. It skips points with ‖x‖² ≤ 1e-3, near the origin. It repeats points if
    there are fewer than samples. Ties follow the tree in which its threads compare: they go to the
    thread whose number, read with its bits reversed, is lowest, and within a thread to the lower
    index. Sums are float32 in the order of its source: x, y, z. (Its compiler may fuse a
    multiplication and an addition; this code does not.)

    Args:
        xyz: shape (batch, n_points, 3).
        n_samples: 1 or more.

    Returns:
        Indices, int64, shape (batch, n_samples); they may repeat.
    """
    check_points(xyz)
    if n_samples < 1:
        raise ShapeError(f"{n_samples} samples: give 1 or more")
    batch, n_points, _ = xyz.shape
    order = torch.from_numpy(_thread_order(n_points)).to(xyz.device)
    axes = [axis.contiguous() for axis in xyz.detach().float()[:, order].unbind(-1)]
    gap, spare = torch.empty_like(axes[0]), torch.empty_like(axes[0])
    _square_gaps(axes, [torch.zeros(1, 1, device=xyz.device)] * 3, gap, spare)
    skipped = gap <= 1e-3
    distance = torch.full_like(gap, 1e10).masked_fill(skipped, -1.0)
    rows = torch.arange(batch, device=xyz.device)
    last = torch.full((batch,), int((order == 0).nonzero()), device=xyz.device)
    first = last.clone()
    chosen = torch.empty(batch, n_samples, dtype=torch.long, device=xyz.device)
    for i in range(n_samples):
        chosen[:, i] = order[last]
        _square_gaps(axes, [axis[rows, last, None] for axis in axes], gap, spare)
        torch.minimum(distance, gap, out=distance)
        last = torch.where(skipped.all(1), first, distance.argmax(dim=1))
    return chosen


def nearest(xyz: Tensor, queries: Tensor, k: int) -> Tensor:
    """The k nearest points of each query, nearest first.

    Args:
        xyz: shape (batch, n_points, 3).
        queries: shape (batch, n_queries, 3).
        k: 1 ≤ k ≤ n_points.

    Returns:
        Indices, int64, shape (batch, n_queries, k), points at the same distance in any order.

    Raises:
        ShapeError: wrong shape, or k outside its range.
    """
    check_points(xyz)
    n_points = xyz.shape[1]
    if not 1 <= k <= n_points:
        raise ShapeError(f"k={k} neighbours of {n_points} points: out of range")
    points, queries = xyz.detach().float(), queries.detach().float()
    if xyz.device.type == "cpu" and n_points >= TREE_ABOVE and is_installed("scipy"):
        return _nearest_by_tree(points, queries, k)
    step = max(1, CHUNK // (points.shape[0] * n_points))
    parts = [
        # |a|² − 2ab + |b|² would round away the small distances that decide.
        torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        .topk(k, largest=False)
        .indices
        for part in queries.split(step, dim=1)
    ]
    return torch.cat(parts, dim=1)


def ball(xyz: Tensor, queries: Tensor, radius: float, k: int, strict: bool = False) -> Tensor:
    """The first k points, by index, within a radius of each query.

    Source: PointNet++. Groups of fewer than k are filled up with their first point; a query
    without a point in its ball gets the nearest point, k times.

    Args:
        xyz: shape (batch, n_points, 3).
        queries: shape (batch, n_queries, 3).
        radius: in the units of ``xyz``; a point exactly on the sphere is inside.
        k: 1 or more.
        strict: as ``pointnet2_ops``: a point on the sphere is outside, and empty balls get point
            0.

    Returns:
        Indices, int64, shape (batch, n_queries, k).
    """
    check_points(xyz)
    points, queries = xyz.detach().float(), queries.detach().float()
    limit = torch.tensor(radius, dtype=torch.float32).square().item()
    return torch.stack([_ball(p, q, limit, k, strict) for p, q in zip(points, queries)])


def _ball(points: Tensor, queries: Tensor, limit: float, k: int, strict: bool) -> Tensor:
    """The same for one cloud and the square of the radius, shape (n_queries, k).

    Points are looked through by index, some at once, and queries that have found k are done: in a
    dense cloud that takes a small part of it.
    """
    device, n_queries = points.device, len(queries)
    found = torch.zeros(n_queries, k, dtype=torch.long, device=device)
    count = torch.zeros(n_queries, dtype=torch.long, device=device)
    closest = torch.full((n_queries,), torch.inf, device=device)
    fallback = torch.zeros(n_queries, dtype=torch.long, device=device)
    unfinished = torch.arange(n_queries, device=device)
    start = 0
    while start < len(points) and len(unfinished):
        if start >= BALL_TREE_AFTER and device.type == "cpu" and is_installed("scipy"):
            found[unfinished] = _balls_by_tree(points, queries[unfinished], limit, k, strict)
            count[unfinished] = k
            break
        part = points[start : start + max(1, BALL_CHUNK // len(unfinished))]
        gap = _square_distance(queries[None, unfinished], part[None])[0]
        row, column = (gap < limit if strict else gap <= limit).nonzero(as_tuple=True)
        here = torch.bincount(row, minlength=len(unfinished))
        before = count[unfinished]
        place = torch.arange(len(row), device=device) + (before + here - here.cumsum(0))[row]
        kept = place < k
        found[unfinished[row[kept]], place[kept]] = column[kept] + start
        if not strict:
            empty = (before + here == 0).nonzero()[:, 0]
            least = gap[empty].min(dim=1)
            nearer = least.values < closest[unfinished[empty]]
            lacking = unfinished[empty[nearer]]
            closest[lacking] = least.values[nearer]
            fallback[lacking] = least.indices[nearer] + start
        count[unfinished] = before + here
        unfinished = unfinished[before + here < k]
        start += len(part)
    first = torch.where(count == 0, fallback, found[:, 0])[:, None]
    lacks = torch.arange(k, device=device) >= count[:, None]
    return torch.where(lacks, first, found)


def _balls_by_tree(points: Tensor, queries: Tensor, limit: float, k: int, strict: bool) -> Tensor:
    """The same for sparse balls, whose points a k-d tree finds; float32 decides what is inside."""
    from scipy.spatial import KDTree

    tree = KDTree(points.numpy(), balanced_tree=False, compact_nodes=False)
    wider = math.sqrt(limit) * (1 + ROUNDING)
    nearest = tree.query(queries.numpy(), k=1)[0] * (1 + ROUNDING)
    reach = np.zeros(len(queries)) if strict else nearest
    members = tree.query_ball_point(queries.numpy(), np.maximum(reach, wider), return_sorted=True)
    rows = []
    for query, candidates in zip(queries, members):
        index = torch.tensor(candidates, dtype=torch.long)
        gap = _square_distance(query[None, None], points[None, index])[0, 0]
        inside = index[gap < limit if strict else gap <= limit][:k]
        if not len(inside):
            inside = index.new_zeros(1) if strict else index[gap.argmin()][None]
        rows.append(torch.cat([inside, inside[:1].expand(k - len(inside))]))
    return torch.stack(rows)


def _square_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances, summed as x, y, z, shape (batch, n_a, n_b)."""
    ours, theirs = a[:, :, None].unbind(-1), b[:, None].unbind(-1)
    out, spare = (a.new_empty(len(a), a.shape[1], b.shape[1]) for _ in range(2))
    _square_gaps(ours, theirs, out, spare)
    return out


def _square_gaps(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], out: Tensor, spare: Tensor
) -> None:
    """Squared distances, summed as x, y, z, without new memory.

    Args:
        ours: x, y and z of points.
        theirs: x, y and z of others, in shapes that broadcast with those.
        out: where the distances go, of the shape that results.
        spare: is overwritten, same shape.
    """
    torch.sub(ours[0], theirs[0], out=out).square_()
    for mine, other in zip(ours[1:], theirs[1:]):
        out += torch.sub(mine, other, out=spare).square_()


def _thread_order(n_points: int) -> np.ndarray:
    """Indices in the order in which ``pointnet2_ops`` prefers points at the same distance."""
    n_threads = min(1 << int(math.log2(n_points)), 512)
    bits = n_threads.bit_length() - 1
    index = np.arange(n_points)
    thread = index % n_threads
    reverse = sum(((thread >> i) & 1) << (bits - 1 - i) for i in range(bits)) + 0 * thread
    return np.lexsort((index, reverse))


def _nearest_by_tree(points: Tensor, queries: Tensor, k: int) -> Tensor:
    from scipy.spatial import KDTree

    neighbours = [KDTree(p.numpy()).query(q.numpy(), k=k)[1] for p, q in zip(points, queries)]
    stacked = np.stack(neighbours).reshape(len(points), queries.shape[1], k)
    return torch.from_numpy(stacked.astype(np.int64))
