"""Columns of tables without names: which of them are coordinates and colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError

MOST_COLUMNS = 16
_NAME_THEM = "name the columns with columns='xyz_rgb' (--columns)"


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
    others are colours where exactly one such triple has the range of colours, and normals,
    intensities and the like are left out.

    Args:
        table: numbers, shape (n_points, n_columns).
        source: for messages.

    Returns:
        The letters, and a note for the user or None.

    Raises:
        InputError: fewer than 3 columns or many, a table on its side, or a first column that counts
            the rows.
    """
    n_rows, width = table.shape
    if not 3 <= width <= MOST_COLUMNS:
        on_its_side = width > MOST_COLUMNS and 3 <= n_rows <= 8
        aside = "; it seems to lie on its side, save its transpose" if on_its_side else ""
        raise InputError(
            f"{source} has {width} columns, expected 3 to {MOST_COLUMNS}{aside}; {_NAME_THEM}"
        )
    if width > 3 and n_rows > 2 and _counts(table[:, 0]):
        raise InputError(f"{source}: its first column counts the rows; {_NAME_THEM}")
    starts = [at for at in range(3, width - 2) if are_colors(table[:, at : at + 3])]
    if len(starts) == 1:
        at = starts[0]
        return "xyz" + "_" * (at - 3) + "rgb" + "_" * (width - at - 3), None
    letters = "xyz" + "_" * (width - 3)
    if not starts:
        return letters, None
    places = " or ".join(f"{at + 1} to {at + 3}" for at in starts)
    return letters, f"colours could be in columns {places}, so none are used; {_NAME_THEM}"


def are_colors(values: NDArray[Any]) -> bool:
    """Whether three columns have the range of colours.

    That is 0…1, whole numbers up to 65,535, or others up to 255 of like range. Colours vary
    together: one column that never changes beside others that do is no colour.
    """
    if not np.isfinite(values).all():
        values = values[np.isfinite(values).all(axis=1)]
    if not len(values) or values.min() < 0 or values.max() > 65535 or not values.any():
        return False
    still = (values == values[0]).all(axis=0)
    if len(values) > 9 and still.any() and not still.all():
        return False
    if values.max() <= 1 or (values == np.round(values)).all():
        return True
    peaks = values.max(axis=0)
    return bool(peaks.max() <= 255 and peaks.min() > 0.1 * peaks.max())


def _counts(column: NDArray[Any]) -> bool:
    return bool(column[0] in (0, 1) and (np.diff(column) == 1).all())


def no_effect(columns: str | None, what: str) -> str | None:
    """A note that columns were given for what says itself what its values are.

    Args:
        columns: those given; None for no note.
        what: it is.
    """
    return None if columns is None else f"columns={columns!r} has no effect on {what}"
