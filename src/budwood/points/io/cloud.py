"""A point cloud in memory, and what every reader promises about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points of one object or scene.

    Attributes:
        xyz: coordinates in the units and axes of the file, float64 (map coordinates lose their
            last metres in float32), shape (n_points, 3).
        rgb: colours in [0, 1], float32, shape (n_points, 3); None without.
        source: where it came from, for messages.
    """

    xyz: Array
    rgb: NDArray[np.float32] | None = None
    source: str = "cloud"

    def __len__(self) -> int:
        return len(self.xyz)

    def take(self, indices: NDArray[np.integer]) -> Cloud:
        """The points at ``indices``."""
        rgb = None if self.rgb is None else self.rgb[indices]
        return replace(self, xyz=self.xyz[indices], rgb=rgb)


def make_cloud(
    xyz: object,
    rgb: object = None,
    *,
    source: str = "cloud",
    invalid: str = "error",
) -> Cloud:
    """A checked cloud.

    Args:
        xyz: coordinates, shape (n_points, 3), n_points ≥ 1.
        rgb: colours as 0…1 floats, or as 0…255 (and 0…65535) integers or floats, same shape.
        source: where it came from, for messages.
        invalid: ``"error"``, or ``"drop"`` to leave out points with NaN or infinite coordinates,
            which some scanners write for beams without a return.

    Raises:
        InputError: wrong shape, no points, or NaN and infinite coordinates.
    """
    points = _floats(xyz, "coordinates", source)
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"{source}: points have shape {points.shape}, expected (n_points, 3)")
    if len(points) == 0:
        raise InputError(f"{source} has no points")
    fine = np.asarray(np.isfinite(points).all(axis=1))
    n_bad = int((~fine).sum())
    if n_bad and invalid != "drop":
        raise InputError(
            f"{source}: {n_bad} of {len(points)} points have NaN or infinite coordinates; "
            "clean the file, or leave them out with invalid='drop' (--drop-invalid)"
        )
    if n_bad == len(points):
        raise InputError(f"{source}: all {n_bad} points have NaN or infinite coordinates")
    colors = None if rgb is None else unit_colors(rgb, fine, source)
    return Cloud(points[fine] if n_bad else points, colors, source)


def unit_colors(rgb: object, keep: NDArray[np.bool_], source: str) -> NDArray[np.float32]:
    """Colours of the points to keep as float32 in [0, 1].

    Integers are divided by the largest value of 8 or of 16 bits; so are floats above 1.

    Args:
        rgb: of all points, shape (n_points, 3).
        keep: shape (n_points,). Colours of other points may be anything.
        source: for messages.

    Raises:
        InputError: wrong shape, NaN, or values outside 0…65535.
    """
    raw = np.asarray(rgb)
    values = _floats(raw, "colours", source)
    if values.shape != (len(keep), 3):
        raise InputError(f"{source}: colours have shape {values.shape}, expected ({len(keep)}, 3)")
    values = values[keep]
    top = float(values.max(initial=0.0))
    if not np.isfinite(values).all() or float(values.min(initial=0.0)) < 0 or top > 65535:
        raise InputError(f"{source}: colours must be 0…1, 0…255 or 0…65535")
    if raw.dtype.kind in "iu" or top > 1:
        values = values / (255.0 if top <= 255 else 65535.0)
    return values.astype(np.float32)


def crop(cloud: Cloud, box: Sequence[float | str]) -> Cloud:
    """The points inside a box, faces included.

    Args:
        cloud: what to cut from.
        box: x0, y0, z0, x1, y1, z1 in the units of the cloud; infinities leave a side open.

    Raises:
        InputError: the box is malformed or holds no point.
    """
    low, high = corners(box)
    inside = ((cloud.xyz >= low) & (cloud.xyz <= high)).all(axis=1)
    if not inside.any():
        bounds = [*cloud.xyz.min(axis=0).round(3), *cloud.xyz.max(axis=0).round(3)]
        around = ", ".join(f"{x:g}" for x in bounds)
        raise InputError(f"{cloud.source}: no point in the box; the cloud spans {around}")
    return cloud.take(np.flatnonzero(inside))


def corners(box: Sequence[float | str]) -> tuple[Array, Array]:
    """The lowest and the highest corner of a box, as of :func:`crop`, each of shape (3,).

    Raises:
        InputError: the box is malformed.
    """
    try:
        low, high = np.asarray(box, dtype=np.float64).reshape(2, 3)
    except (TypeError, ValueError):
        raise InputError(f"box {box!r} must be six numbers: x0, y0, z0, x1, y1, z1") from None
    if np.isnan([low, high]).any() or (low > high).any():
        raise InputError(f"box {list(box)} must have x0 ≤ x1, y0 ≤ y1 and z0 ≤ z1")
    return low, high


def _floats(values: object, what: str, source: str) -> Array:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"dtype {array.dtype}")
        return np.ascontiguousarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {what} are not numbers ({error})") from None
