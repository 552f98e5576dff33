"""Bare float32 tables: .bin of KITTI, nuScenes, Waymo, SUN RGB-D, S3DIS.

Nothing in the file says how many columns there are; their values do, or the file is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.points.io.cloud import Cloud, ReadOptions, make_cloud
from budwood.points.io.columns import are_colors, split_columns

WIDTHS = range(3, 17)
KNOWN = {3: "xyz", 4: "KITTI", 5: "nuScenes", 6: "with colours or normals"}
NUSCENES = ".pcd.bin", 5
MOST_VALUES = 200_000
"""Values that are looked at to tell the columns apart."""
LARGEST, SMALLEST = 1e9, 1e-20
"""Range of sizes that coordinates, intensities, times and the like have; 0 as well."""
AS_MUCH = 0.8
"""A divisor of the best number of columns is taken if it tells this fraction of what that does.
Half of the right number tells 0.75 or less where its columns have ranges of their own."""
LEAST = 0.05
"""What is too little to tell columns apart, nats."""
FEW, MOST_USUAL = 400, 8
"""With fewer values, columns that tell nothing are no sign of a bare cloud if another number of
columns up to the second fits as well."""
BY_CHANCE = 1e-6
CLEAR = 0.9
"""Another number is a rival from this fraction on."""
HALVES = 20
"""With fewer values, float16 cannot be told from float32."""
SMALL_HALF, LARGE_HALF = 1e-3, 1e4
"""Range of nearly all values of a table in float16; of random bits, a quarter is outside."""
WIDE = 6
"""Standard deviation in powers of 2 above which values are no usual float32."""
_NAME_THEM = "name the columns, such as columns='xyz_' for KITTI's or 'xyz__' for nuScenes' five"


def read_bin(path: Path, options: ReadOptions) -> Cloud:
    """Read a float32 table, point after point; see :func:`count_columns`."""
    size = path.stat().st_size
    width = None if options.columns is None else len(options.columns)
    unit = 4 * (width or 1)
    if size % unit:
        what = f"{unit} ({width} float32 a point)" if width else "4: it holds no float32"
        raise InputError(
            f"{path} has {size} bytes, not a multiple of {what}: truncated, or of other columns"
        )
    values = np.fromfile(path, dtype="<f4")
    _check_halves(values, path)
    if options.columns is not None and width is not None:
        coordinates = [options.columns.index(letter) for letter in "xyz"]
        _check_values(values.reshape(-1, width)[:, coordinates].ravel(), path)
    if width is None:
        width = count_columns(values, path)
    table = values.reshape(-1, width)
    xyz, rgb, columns, note = split_columns(table, options.columns, str(path))
    cloud = make_cloud(xyz, rgb, source=str(path), invalid=options.invalid, columns=columns)
    return cloud.noting(note)


def count_columns(values: NDArray[np.float32], path: Path) -> int:
    """Tell how many columns a bare table has, by its values.

    With the right number, each column has a distribution of its own: heights are small, rings are
    whole, intensities are not negative. With another, columns are mixtures that look alike. So the
    number is the smallest that tells most about a value. Where all tell next to nothing, as for a
    centred object without intensities, the ranges that columns must have decide.

    Args:
        values: of the file.
        path: its name; ``.pcd.bin`` is nuScenes'.

    Raises:
        InputError: the values are not those of a float32 table, no number of columns fits, or
            several do.
    """
    _check_values(values, path)
    n_values = len(values)
    suffix, width = NUSCENES
    is_named = path.name.lower().endswith(suffix) and n_values % width == 0
    if is_named and _may_be(values.reshape(-1, width)):
        return width
    fitting = [width for width in WIDTHS if n_values % width == 0]
    clear = _clear_widths(values)
    if len(clear) == 1 and clear[0] not in fitting:
        raise InputError(
            f"{path} has {n_values} float32, not whole rows of the {clear[0]} columns "
            f"that its values seem to have: truncated, or with a header; {_NAME_THEM}"
        )
    if len(clear) == 1:
        return clear[0]
    candidates = [width for width in fitting if width in (clear or KNOWN)]
    plausible = [width for width in candidates if _may_be(values.reshape(-1, width))]
    sure = [width for width in plausible if width > 3 and _no_accident(values, width)]
    if len(sure) == 1:
        return sure[0]
    others = [width for width in fitting if 3 < width <= MOST_USUAL]
    is_guess = plausible == [3] and others and n_values < FEW  # nothing speaks for 3
    if len(plausible) == 1 and not is_guess:
        return plausible[0]
    raise _ambiguous(path, n_values, plausible)


def told_by_columns(values: NDArray[np.float32]) -> dict[int, float]:
    """What the column of a value tells about the value, for each number of columns.

    Args:
        values: of the file, row after row.

    Returns:
        Number of columns → mutual information, nats, less what chance alone gives (Miller–Madow)
        and three standard deviations of that.
    """
    at = np.arange(len(values))
    if len(values) > MOST_VALUES:
        at = np.random.default_rng(0).integers(len(values), size=MOST_VALUES)
    sample = np.nan_to_num(values[at])
    n_bins = int(np.clip(np.sqrt(len(sample)) / 2, 4, 32))
    edges = np.unique(np.quantile(sample, np.linspace(0, 1, n_bins + 1)[1:-1]))
    bins = np.searchsorted(edges, sample)
    told = {}
    for width in WIDTHS:
        counts = np.bincount(
            at % width * (len(edges) + 1) + bins, minlength=width * (len(edges) + 1)
        )
        joint = counts.reshape(width, -1) / len(sample)
        alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        filled = joint > 0
        nats = (joint[filled] * np.log(joint[filled] / alone[filled])).sum()
        freedom = (width - 1) * len(edges)
        told[width] = float(nats) - (freedom / 2 + 3 * np.sqrt(freedom / 2)) / len(sample)
    return told


def _clear_widths(values: NDArray[np.float32]) -> list[int]:
    """The numbers of columns that explain the values: one, several rivals, or none."""
    told = told_by_columns(values)
    best = max(told, key=lambda width: told[width])
    many = len(values) >= FEW
    if told[best] < LEAST * (1 if many else 3):
        return []
    # Twice the right number explains as much, or more where rows take turns, as rings do.
    first = min(w for w in WIDTHS if best % w == 0 and told[w] >= AS_MUCH * told[best])
    if not many and first not in KNOWN:
        return []
    rivals = [w for w in WIDTHS if w % first and told[w] >= CLEAR * told[best]]
    return [first, *rivals]


def _check_values(values: NDArray[np.float32], path: Path) -> None:
    size = np.abs(values[np.isfinite(values)])
    strange = (size > LARGEST) | ((size > 0) & (size < SMALLEST))
    if not len(size) or strange.mean() > 0.01:
        raise InputError(
            f"{path} holds no float32 coordinates: many of its values are NaN, above {LARGEST:g} "
            f"or below {SMALLEST:g}; save float32, or a format with a header"
        )


def _check_halves(values: NDArray[np.float32], path: Path) -> None:
    """Refuse a table of float16, two of which were read as one number.

    Read as float16, its values are like each other, while the lower halves of float32 are of any
    size, or few. Read as float32, its values spread over eight times as many powers of 2.
    """
    sample = values[:MOST_VALUES]
    halves = sample.view("<f2").astype(np.float64)
    if not len(halves) or not np.isfinite(halves[np.isfinite(sample).repeat(2)]).all():
        return
    lower = np.abs(halves[::2])
    sizes = lower[lower > 0]
    if len(sizes) < max(HALVES, len(lower) / 4) or len(np.unique(sizes)) < HALVES / 2:
        return
    usual = (sizes > SMALL_HALF) & (sizes < LARGE_HALF)
    powers = np.log2(np.abs(sample[np.isfinite(sample) & (sample != 0)]).astype(np.float64))
    if usual.mean() > 0.95 and powers.std() > WIDE:
        raise InputError(f"{path} seems to hold float16, not float32; save float32")


def _may_be(table: NDArray[np.float32]) -> bool:
    """Whether the columns behind x, y and z can be what files with so many columns have there."""
    rest = table[:, 3:]
    rest = rest[np.isfinite(rest).all(axis=1)]
    if table.shape[1] == 3:
        return True
    if not len(rest):
        return False
    if table.shape[1] == 6:
        normals = np.allclose(np.linalg.norm(rest, axis=1), 1, atol=0.02)
        return normals or are_colors(rest)
    intensity = rest[:, 0]
    is_intensity = bool(intensity.min() >= 0 and (intensity.max() <= 1 or _whole(intensity)))
    if table.shape[1] == 4:
        return is_intensity
    ring = rest[:, 1]
    return bool(intensity.min() >= 0 and ring.min() >= 0 and ring.max() <= 255 and _whole(ring))


def _no_accident(values: NDArray[np.float32], width: int) -> bool:
    """Whether a fourth column without negative values would hardly come about by chance."""
    column = values[3::width]
    negative = float((values < 0).mean())
    return bool(column.min() >= 0 and (1 - negative) ** len(column) < BY_CHANCE)


def _whole(column: NDArray[np.float32]) -> bool:
    return bool((column == np.round(column)).all() and column.max() <= 65535)


def _ambiguous(path: Path, n_values: int, plausible: list[int]) -> InputError:
    if plausible:
        found = " or ".join(f"{width} ({KNOWN.get(width, 'unknown')})" for width in plausible)
        return InputError(f"{path} could have {found} columns; {_NAME_THEM}")
    return InputError(
        f"{path} has {n_values} float32, and no number of columns fits them: truncated, or of "
        f"another layout; {_NAME_THEM}"
    )
