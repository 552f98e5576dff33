"""Columns of tables without names: which of them are coordinates and colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError

MOST_COLUMNS = 16
ALIKE = 0.25
"""Each channel has this fraction of the peak of another, and of its number of values."""
BRIGHT, TOGETHER = 128, 0.7
"""Least peak of bright channels of 8 bits, and least correlation of others."""
MOST_ROWS = 100_000
"""Rows that are looked at, about."""
LATEST = 1e9
"""First values above are times since 1970 in seconds or less; coordinates on earth are below."""
FEW = 9
"""So many rows or fewer may rise by chance."""
_NAME_THEM = "name the columns with columns='xyz_rgb' (--columns)"
_NAME_TIME = "name the columns, such as columns='_xyz' (--columns)"


def split_columns(
    table: NDArray[Any], columns: str | None, source: str
) -> tuple[NDArray[Any], NDArray[Any] | None, str, str | None]:
    """Split a table into coordinates and colours.

    Args:
        table: shape (n_points, n_columns).
        columns: one letter a column: x, y, z, r, g, b, or ``_`` for a column to leave out. None:
            see :func:`guess_columns`.
        source: for messages.

    Returns:
        xyz and rgb (or None), shape (n_points, 3), the letters, and a note for the user or None.

    Raises:
        InputError: no numbers, or a number of columns that ``columns`` does not fit.
    """
    if table.dtype.kind not in "fiu":
        raise InputError(f"{source} holds {table.dtype}, expected numbers")
    if table.ndim != 2:
        raise InputError(f"{source} has shape {table.shape}, expected (n_points, n_columns)")
    note = None
    if columns is None:
        columns, note = guess_columns(table, source)
    if len(columns) != table.shape[1]:
        raise InputError(
            f"{source} has {table.shape[1]} columns, columns={columns!r} names {len(columns)}"
        )
    xyz = table[:, [columns.index(letter) for letter in "xyz"]]
    colored = all(letter in columns for letter in "rgb")
    rgb = table[:, [columns.index(letter) for letter in "rgb"]] if colored else None
    return xyz, rgb, columns, note


def guess_columns(table: NDArray[Any], source: str) -> tuple[str, str | None]:
    """Letters of the columns of a table, by their values.

    The first three are x, y and z, as in all layouts that we know. Three neighbours among the
    others are colours where exactly one such triple looks like colours; normals, intensities,
    labels and the like are left out.

    Args:
        table: numbers, shape (n_points, n_columns).
        source: for messages.

    Returns:
        The letters, and a note for the user or None.

    Raises:
        InputError: fewer than 3 columns or many, a table on its side, or a first column that counts
            the rows or looks like a time.
    """
    n_rows, width = table.shape
    if not 3 <= width <= MOST_COLUMNS:
        on_its_side = width > MOST_COLUMNS and 3 <= n_rows <= 8
        aside = "; it seems to lie on its side, save its transpose" if on_its_side else ""
        raise InputError(
            f"{source} has {width} columns, expected 3 to {MOST_COLUMNS}{aside}; {_NAME_THEM}"
        )
    note = _first_column(table, source) if width > 3 and n_rows > 2 else None
    starts = [at for at in range(3, width - 2) if are_colors(table[:, at : at + 3])]
    sure = [at for at in starts if look_like_colors(table[:, at : at + 3])]
    if len(sure) == 1:
        at = sure[0]
        return "xyz" + "_" * (at - 3) + "rgb" + "_" * (width - at - 3), note
    if starts and note is None:
        places = " or ".join(f"{at + 1} to {at + 3}" for at in sure or starts)
        note = f"colours could be in columns {places}, so none are used; {_NAME_THEM}"
    return "xyz" + "_" * (width - 3), note


def are_colors(values: NDArray[Any]) -> bool:
    """Whether three columns have the range of colours.

    That is 0…1, whole numbers up to 65,535, or others up to 255 of like range. Colours vary
    together: one column that never changes beside others that do is no colour.
    """
    values = _finite(values)
    if not len(values) or values.min() < 0 or values.max() > 65535 or not values.any():
        return False
    still = (values == values[0]).all(axis=0)
    if len(values) > FEW and still.any() and not still.all():
        return False
    if values.max() <= 1 or _whole(values):
        return True
    peaks = values.max(axis=0)
    return bool(peaks.max() <= 255 and peaks.min() > 0.1 * peaks.max())


def look_like_colors(values: NDArray[Any]) -> bool:
    """Whether three columns in the range of colours are hardly anything else.

    Whole numbers can be an intensity, a ring and a label as well. Colours get bright together, or
    are bright, with peaks and numbers of different values that are alike.

    Args:
        values: for which :func:`are_colors` holds, shape (n_points, 3).
    """
    values = _finite(values)[:: 1 + len(values) // MOST_ROWS].astype(np.float64)
    if not _whole(values):
        return True
    peaks = values.max(axis=0)
    kinds = np.array([len(np.unique(column)) for column in values.T])
    if kinds.min() > 1 and np.corrcoef(values.T).min() > TOGETHER:
        return True
    alike = peaks.min() >= ALIKE * peaks.max() and kinds.min() >= ALIKE * kinds.max()
    return bool(alike and peaks.min() >= BRIGHT and peaks.max() <= 255)


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    """The rows without NaN and infinities."""
    finite = np.isfinite(values).all(axis=1)
    return values if finite.all() else values[finite]


def _whole(values: NDArray[Any]) -> bool:
    return bool((values == np.round(values)).all())


def _first_column(table: NDArray[Any], source: str) -> str | None:
    """A note if the first column may be no coordinate, but a time, an index or a label.

    Raises:
        InputError: it counts the rows, or is a time.
    """
    column, *others = _finite(table[:MOST_ROWS, :4].astype(np.float64)).T
    if len(column) < 3:
        return None
    steps = np.diff(column)
    if column[0] in (0, 1) and (steps == 1).all():
        raise InputError(f"{source}: its first column counts the rows; {_NAME_THEM}")
    if not _are_coordinates(others):
        return None
    if len(column) > FEW and (steps >= 0).all():
        if column[0] > LATEST or (column[0] >= 0 and _is_even(steps, column, table.dtype)):
            raise InputError(
                f"{source}: its first column looks like a time or an index; {_NAME_TIME}, or "
                "columns='xyz_' if it is x"
            )
        how = "only rises" if column[-1] > column[0] else f"is {column[0]:g} in all rows"
        return f"the first column {how}; if it is a time or an index, {_NAME_TIME}"
    if _whole(column) and not any(_whole(other) for other in others):
        return f"the first column is of whole numbers; if it is an index or the like, {_NAME_TIME}"
    return None


def _are_coordinates(others: list[NDArray[np.float64]]) -> bool:
    """Whether the columns behind the first can be coordinates.

    The third of them has fractions, or none has, and it is not within 0…1, as intensities are.
    """
    third = others[2]
    if third.min() >= 0 and third.max() <= 1:
        return False
    return not _whole(third) or _whole(np.stack(others))


def _is_even(steps: NDArray[np.float64], column: NDArray[np.float64], dtype: np.dtype) -> bool:
    """Whether a column rises by the same step from row to row, up to rounding."""
    eps = np.finfo(dtype).eps if dtype.kind == "f" else 0.0
    rounded = 4 * eps * np.abs(column).max()
    return bool(steps.min() > 0 and np.ptp(steps) <= rounded + 0.01 * steps.max())


def no_effect(columns: str | None, what: str) -> str | None:
    """A note that columns were given for what says itself what its values are.

    Args:
        columns: those given; None for no note.
        what: it is.
    """
    return None if columns is None else f"columns={columns!r} has no effect on {what}"
