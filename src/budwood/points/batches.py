"""Batches of prepared clouds: features of many clouds, and sparse samples of dense ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from budwood.errors import InputError
from budwood.points.adapters.base import Adapter
from budwood.points.encoders.base import PointEncoder, PreparedCloud
from budwood.points.io.cloud import Cloud
from budwood.points.sampling import SAMPLERS, normalize

NEARLY = 0.9
"""A cloud counts as one of n points from this fraction of n on, since duplicate points may have
been dropped. The clouds of a batch are cut to the smallest."""


def encode(
    encoder: PointEncoder,
    clouds: Sequence[PreparedCloud],
    adapter: Adapter | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Encode prepared clouds, in batches of equally many points.

    Args:
        encoder: frozen.
        clouds: xyz and rgb (or None) of each, from :meth:`PointEncoder.prepare`.
        adapter: made for this encoder.
        batch_size: clouds at once.

    Returns:
        Features, not normalised, on the CPU, shape (n_clouds, embed_dim); with an adapter what its
        :meth:`Adapter.describe` returns, shape (n_clouds, adapter.width).

    Raises:
        InputError: some are NaN or infinite.
    """
    device = next(encoder.parameters()).device
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, (xyz, rgb) in enumerate(clouds):
        groups.setdefault((len(xyz), rgb is not None), []).append(i)
    features = torch.empty(len(clouds), encoder.embed_dim if adapter is None else adapter.width)
    run = encoder if adapter is None else adapter.describe
    with torch.inference_mode():
        for (_, colored), members in groups.items():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                xyz = torch.stack([clouds[i][0] for i in part]).to(device)
                colors = [color for i in part if (color := clouds[i][1]) is not None]
                rgb = torch.stack(colors).to(device) if colored else None
                features[part] = run(xyz, rgb).float().cpu()
    if not features.isfinite().all():
        name = encoder.name if adapter is None else f"{encoder.name} with the adapter"
        raise InputError(f"{name} gives NaN or infinite features: its weights are damaged")
    return features


class SparseSampler:
    """Draws batches of sparse samples from dense clouds.

    Args:
        clouds: prepared ones.
        sampler: a name in ``SAMPLERS``.
        grey: colour of clouds without colours in a batch with colours.
        device: where batches go.
    """

    def __init__(
        self, clouds: Sequence[PreparedCloud], sampler: str, grey: float, device: torch.device
    ) -> None:
        self.clouds, self.sampler, self.grey, self.device = clouds, sampler, grey, device
        self.sizes = np.array([len(xyz) for xyz, _ in clouds])

    def available(self, counts: Sequence[int]) -> tuple[int, ...]:
        """The numbers of points that at least one cloud has."""
        return tuple(n for n in counts if self.n_available(n))

    def n_available(self, n_points: int) -> int:
        """How many clouds have this many points, or nearly."""
        return int((self.sizes >= NEARLY * n_points).sum())

    def choose(self, n_points: int, n_clouds: int, rng: np.random.Generator) -> np.ndarray:
        """Draw indices of at most ``n_clouds`` clouds that have ``n_points`` points, or nearly."""
        dense = np.flatnonzero(self.sizes >= NEARLY * n_points)
        return rng.choice(dense, min(n_clouds, len(dense)), replace=False)

    def sample(
        self, chosen: np.ndarray, n_points: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Sample the chosen clouds.

        Returns:
            xyz and rgb (or None), shape (n_chosen, n, 3), n ≤ ``n_points``.
        """
        seeds = rng.integers(1 << 32, size=len(chosen))
        thin = [
            thinned(self.clouds[i], n_points, self.sampler, int(seed))
            for i, seed in zip(chosen, seeds)
        ]
        xyz, rgb = stacked(thin, self.grey)
        return xyz.to(self.device), None if rgb is None else rgb.to(self.device)


def thinned(cloud: PreparedCloud, n_points: int, sampler: str, seed: int) -> PreparedCloud:
    """Sample a prepared cloud, and normalise it again.

    Args:
        cloud: xyz and rgb (or None), shape (n, 3).
        n_points: to keep at most.
        sampler: a name in ``SAMPLERS``.
        seed: of the draw.
    """
    xyz, rgb = cloud
    points = xyz.double()
    kept = SAMPLERS.get(sampler)(points.numpy(), n_points, seed)
    return _normalized(points[kept]), None if rgb is None else rgb[kept]


def stacked(clouds: Sequence[PreparedCloud], grey: float) -> tuple[Tensor, Tensor | None]:
    """Stack clouds, each cut to as many points as the smallest has.

    LiDAR-like samples differ in their number of points. Points are left out evenly, and what was
    cut is normalised again.

    Args:
        clouds: xyz and rgb (or None) of each.
        grey: colour of clouds without colours among others with colours.

    Returns:
        xyz and rgb (or None), shape (n_clouds, n_smallest, 3).
    """
    n_points = min(len(xyz) for xyz, _ in clouds)
    parts = [_cut(cloud, n_points) for cloud in clouds]
    xyz = torch.stack([xyz for xyz, _ in parts])
    if all(rgb is None for _, rgb in parts):
        return xyz, None
    return xyz, torch.stack(
        [xyz.new_full(xyz.shape[1:], grey) if rgb is None else rgb for _, rgb in parts]
    )


def _cut(cloud: PreparedCloud, n_points: int) -> PreparedCloud:
    xyz, rgb = cloud
    if len(xyz) == n_points:
        return cloud
    rows = torch.linspace(0, len(xyz) - 1, n_points).round().long()
    return _normalized(xyz[rows].double()), None if rgb is None else rgb[rows]


def _normalized(xyz: Tensor) -> Tensor:
    return torch.from_numpy(normalize(Cloud(xyz.numpy())).xyz).float()
