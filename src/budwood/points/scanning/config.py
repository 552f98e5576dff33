"""How frames are cut into objects and named."""

from __future__ import annotations

import math
from dataclasses import dataclass

from budwood.checks import need_at_least, need_bool, need_number, need_positive, need_seed
from budwood.errors import InputError


@dataclass(frozen=True)
class ScanConfig:
    """How frames are cut into objects and named. Lengths are metres.

    Attributes:
        max_range: points farther than this from the sensor, which is at the origin, are left out;
            horizontal distance. None keeps all.
        min_range: points this near or nearer are left out: rows of zeros at least, which stand for
            shots without a return, or the sensor's own vehicle.
        ground: whether ground points are removed.
        ground_height: points up to this far above the ground are ground.
        gap: points at most this far apart are in one cluster; heights count half. From 15 m on the
            gap grows in proportion to the distance, up to twice. In map coordinates, far from the
            origin, it does not grow.
        min_points: smaller clusters are left out.
        max_size: longer clusters (walls, hedges, buildings) are left out.
        max_clusters: at most this many clusters of a frame are named, those of most points first.
        threshold: objects whose labels have less probability than this, against labels of the
            background, are ``"unknown"``; 0 names every object. None: calibrated on the clouds that
            ship, see :func:`budwood.points.scanning.rejection.calibrate`.
        window: frames whose points are accumulated where poses are known.
        points: points of a cluster that are encoded at most; default as many as in the encoder's
            training.
        seed: of all sampling.

    Raises:
        InputError: a value outside its range.
    """

    max_range: float | None = 60.0
    min_range: float = 0.0
    ground: bool = True
    ground_height: float = 0.2
    gap: float = 0.6
    min_points: int = 10
    max_size: float = 20.0
    max_clusters: int = 1000
    threshold: float | None = None
    window: int = 10
    points: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        need_positive(ground_height=self.ground_height, gap=self.gap, max_size=self.max_size)
        if self.max_range is not None:
            need_positive(max_range=self.max_range)
        need_number(lambda r: 0 <= r < math.inf, "number of 0 or more", min_range=self.min_range)
        if self.max_range is not None and self.min_range >= self.max_range:
            raise InputError(
                f"min_range={self.min_range:g} must be below max_range={self.max_range:g}"
            )
        need_at_least(2, min_points=self.min_points)
        need_at_least(1, max_clusters=self.max_clusters, window=self.window)
        if self.points is not None:
            need_at_least(2, points=self.points)
        if self.threshold is not None:
            need_number(lambda t: 0 <= t <= 1, "number from 0 to 1", threshold=self.threshold)
        need_seed(self.seed)
        need_bool(ground=self.ground)
