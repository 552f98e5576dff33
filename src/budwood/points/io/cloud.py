"""A point cloud in memory, and what every reader of files takes and promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.checks import need_at_least, need_int, need_kind
from budwood.errors import InputError, first_line

Array = NDArray[np.float64]


NO_RETURN, INVALID, REPEATED = "no return", "invalid", "repeated"
"""Reasons to leave a point out: a beam without a return, damaged coordinates, and a point at the
same place."""
HIGHEST = 1e30
"""Coordinates above have squares that overflow."""
_ROUNDED = 1e-3
"""By how much colours up to 1 may be above it."""

DEGREES = (
    "the coordinates look like degrees of longitude and latitude, so the shape is squeezed; "
    "project them to metres first, for example to UTM"
)


@dataclass(frozen=True)
class Assumed:
    """What was assumed about a cloud, since its file does not say, and which points were left out.

    Attributes:
        columns: letters of the columns of a table, such as ``"xyz_"``; None where they have names.
        up: the axis that points up, in ``AXES``; by the format of the file, or as given. None:
            unknown, as in an array; y is taken.
        units: of the coordinates, by the file or its format: a name in
            ``budwood.points.io.units.METRES`` or ``"degrees"``; None: unknown.
        dropped: number of points that were left out, by reason.
        notes: what may make the result wrong, each in a few words.
    """

    columns: str | None = None
    up: str | None = None
    units: str | None = None
    dropped: Mapping[str, int] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points of one object or scene.

    Attributes:
        xyz: coordinates in the units and axes of the file, shape (n_points, 3), float64: float32
            would round map coordinates to metres.
        rgb: colours in [0, 1], float32, shape (n_points, 3); None without colours.
        source: where it came from, for messages.
        assumed: what was assumed when it was read, the upward axis among others.
    """

    xyz: Array
    rgb: NDArray[np.float32] | None = None
    source: str = "cloud"
    assumed: Assumed = Assumed()

    def __len__(self) -> int:
        return len(self.xyz)

    def take(self, indices: NDArray[np.integer]) -> Cloud:
        """The points at ``indices``."""
        rgb = None if self.rgb is None else self.rgb[indices]
        return replace(self, xyz=self.xyz[indices], rgb=rgb)

    def without(self, points: NDArray[np.bool_], reason: str) -> Cloud:
        """The other points; ``assumed.dropped`` tells how many were left out, and why.

        Args:
            points: which to leave out, shape (n_points,).
            reason: such as ``"stray"``.
        """
        n_out = int(points.sum())
        if not n_out:
            return self
        dropped = {**self.assumed.dropped, reason: n_out}
        return self.take(np.flatnonzero(~points)).assuming(dropped=dropped)

    def assuming(self, **changes: Any) -> Cloud:
        """The same points, with other values in ``assumed``."""
        return replace(self, assumed=replace(self.assumed, **changes))

    def noting(self, note: str | None) -> Cloud:
        """The same points, with one more note in ``assumed``; None adds nothing."""
        return self if note is None else self.assuming(notes=(*self.assumed.notes, note))


def make_cloud(
    xyz: object,
    rgb: object = None,
    *,
    source: str = "cloud",
    invalid: str = "error",
    columns: str | None = None,
) -> Cloud:
    """Check arrays and make a cloud of them.

    Beams without a return are left out, and counted in ``assumed.dropped``: rows of three NaN or
    infinite coordinates, and rows of zeros where there are several among others.

    Args:
        xyz: coordinates, shape (n_points, 3), n_points ≥ 1.
        rgb: colours, same shape: floats in 0…1, or integers or floats in 0…255 or 0…65535.
        source: where it came from, for messages.
        invalid: ``"error"``, or ``"drop"`` to leave out points of which one or two coordinates are
            NaN or infinite as well.
        columns: letters of the table's columns, for ``assumed``.

    Raises:
        InputError: wrong shape, no points, or NaN and infinite coordinates.
    """
    points = as_points(xyz, source)
    finite = np.isfinite(points)
    empty = ~finite.any(axis=1)
    origin = ~points.any(axis=1)
    if origin.sum() > 1 and not (origin | empty).all():
        empty |= origin
    bad = ~finite.all(axis=1) & ~empty
    if bad.any() and invalid != "drop":
        raise not_finite(int(bad.sum()), len(points), source)
    kept = np.asarray(~(empty | bad))
    if not kept.any():
        raise InputError(f"{source}: all {len(points)} points have NaN or infinite coordinates")
    if (largest := np.abs(points[kept]).max()) > HIGHEST:
        raise InputError(f"{source} has coordinates up to {largest:.0e}; look for damaged ones")
    colors = None if rgb is None else unit_colors(rgb, kept, source)
    counts = {NO_RETURN: int(empty.sum()), INVALID: int(bad.sum())}
    dropped = {reason: n for reason, n in counts.items() if n}
    cloud = Cloud(points[kept] if dropped else points, colors, source, Assumed(columns=columns))
    return cloud.assuming(dropped=dropped).noting(DEGREES if _in_degrees(cloud.xyz) else None)


def as_points(xyz: object, source: str) -> Array:
    """Coordinates as float64, shape (n_points, 3).

    Raises:
        InputError: wrong shape, no numbers, or no points.
    """
    points = _floats(xyz, "coordinates", source)
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"{source}: points have shape {points.shape}, expected (n_points, 3)")
    if len(points) == 0:
        raise InputError(f"{source} has no points")
    return points


def not_finite(n_bad: int, n_points: int, source: str) -> InputError:
    """The error for NaN or infinite coordinates."""
    return InputError(
        f"{source}: {n_bad} of {n_points} points have NaN or infinite coordinates; "
        "clean the file, or leave them out with invalid='drop' (--drop-invalid)"
    )


def some_colored(n_colored: int, n_all: int, what: str) -> str | None:
    """A note that colours are lost, since only some parts of a file have them.

    Args:
        n_colored: how many have colours.
        n_all: how many there are.
        what: they are.
    """
    if n_colored in (0, n_all):
        return None
    return f"{n_colored} of {n_all} {what} have colours, so none are used"


def _in_degrees(xyz: Array) -> bool:
    """Whether x and y look like degrees and z like metres, by their ranges and extents."""
    low, high = xyz.min(axis=0), xyz.max(axis=0)
    on_earth = (np.maximum(-low, high) <= (180.0, 90.0, 1e4)).all()
    extent = high - low
    width = extent[:2].max()
    away = np.abs((low + high)[:2] / 2).max() > 1.0
    return bool(on_earth and away and extent[2] > 0.5 and 0 < width < 1e-3 * extent[2])


def unit_colors(rgb: object, keep: NDArray[np.bool_], source: str) -> NDArray[np.float32]:
    """Convert the colours of the points to keep to float32 in [0, 1].

    Integers, and floats above 1, are divided by the largest value of 8 or of 16 bits.

    Args:
        rgb: of all points, shape (n_points, 3).
        keep: which points to keep, shape (n_points,); colours of the others are not checked.
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
    if n_bad := int((~np.isfinite(values)).any(axis=1).sum()):
        raise InputError(
            f"{source}: colours of {n_bad} of {len(values)} points are empty or NaN; fill them in, "
            "or leave these columns out"
        )
    if float(values.min(initial=0.0)) < 0 or top > 65535:
        raise InputError(f"{source}: colours must be 0…1, 0…255 or 0…65535")
    if raw.dtype.kind in "iu" or top > 1 + _ROUNDED:
        values = values / (255.0 if top <= 255 else 65535.0)
    return values.clip(0, 1).astype(np.float32)


@dataclass(frozen=True)
class ReadOptions:
    """Options of every reader; each uses those that mean something for its format.

    Attributes:
        columns: letters of the columns of a table, such as ``"xyz_rgb"``; None: guess them.
        invalid: ``"error"`` or ``"drop"``, for points with NaN or infinite coordinates.
        n_points: points sampled from a mesh.
        seed: seed of that sampling, 0 or more.
    """

    columns: str | None = None
    invalid: str = "error"
    n_points: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.invalid not in ("error", "drop"):
            raise InputError(f"invalid={self.invalid!r} is unknown; give 'error' or 'drop'")
        need_int(1, n_points=self.n_points)
        if self.n_points > 100_000_000:
            raise InputError(f"n_points={self.n_points} is outside 1…100,000,000")
        need_at_least(0, seed=self.seed)
        if self.columns is not None and not are_columns(self.columns):
            raise InputError(
                f"columns={self.columns!r} must have x, y, z once, r, g, b once or not at all, and "
                "_ for each column to leave out"
            )


def are_columns(columns: Any) -> bool:
    """Whether letters of columns have x, y, z once, and r, g, b once or not at all."""
    if not isinstance(columns, str):
        return False
    return sorted(columns.replace("_", "")) in (sorted("xyz"), sorted("xyzrgb"))


def damaged(path: Path, error: BaseException) -> InputError:
    """The error for a file that another library failed to read."""
    return InputError(f"{path} is truncated or damaged: {first_line(error)}")


def crop(cloud: Cloud, box: Sequence[float | str]) -> Cloud:
    """Return the points inside a box, its faces included.

    Args:
        cloud: to crop.
        box: x0, y0, z0, x1, y1, z1 in the units of the cloud; infinities leave a side open.

    Raises:
        InputError: the box is malformed or holds no point.
    """
    need_kind(Cloud, "Cloud, such as read() gives", cloud=cloud)
    low, high = corners(box)
    inside = ((cloud.xyz >= low) & (cloud.xyz <= high)).all(axis=1)
    if not inside.any():
        bounds = [*cloud.xyz.min(axis=0).round(3), *cloud.xyz.max(axis=0).round(3)]
        extent = ", ".join(f"{x:g}" for x in bounds)
        raise InputError(f"{cloud.source}: no point in the box; the cloud spans {extent}")
    return cloud.take(np.flatnonzero(inside))


def corners(box: Sequence[float | str]) -> tuple[Array, Array]:
    """Return the lowest and the highest corner of a box (see :func:`crop`), each of shape (3,).

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
