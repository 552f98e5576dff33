"""Named fields of files: which of them are coordinates and colours, in all the usual spellings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError

XYZ_NAMES = (
    *("xyz", "points", "pc", "pointcloud", "point_cloud", "pcd", "coords", "coord", "pos"),
    *("position", "positions", "vertices", "pcloud_points", "cloud", "arr_0"),
)
"""Fields that hold all three coordinates."""
RGB_NAMES = ("rgb", "rgba", "colors", "color", "colours", "colour")
"""Fields that hold all colours, as three or four columns or packed into one number."""
LON_LAT = ("lon", "long", "longitude", "lng"), ("lat", "latitude")

EASTING, NORTHING = ("easting", "east", "e"), ("northing", "north", "n")
HEIGHT = ("height", "elevation", "altitude", "alt", "up", "h", "u")
"""Names of coordinates in surveys; they count where x and y have no names."""

UNIT_BEHIND = r"[mck]?m|ft"
"""A unit that follows the name of a coordinate, as in ``x_mm``."""
_UNIT = re.compile(r"\s*[(\[].*[)\]]$")  # "X (m)"
_NUMBERED = re.compile(r"(?:points?|xyz)(?:_m_xyz)?[ _.:]?([012])")  # ParaView, VeloView
_OF_POINTS = r"(?:cartesian|position|pos|points?|coords?|vertex|field)?[ _.:]?"
_COORDINATE = re.compile(_OF_POINTS + rf"([xyz])(?:[ _](?:coord|coordinate|{UNIT_BEHIND}))?")
_OF_COLORS = r"(?:diffuse|vertex|points?|colou?rs?|rgb)?[ _.:]?"
_COLOR = re.compile(_OF_COLORS + r"([rgb]|red|green|blue)(?:[ _]?(?:8|16|channel))?")


def letter_of(name: str) -> str | None:
    """The letter of a field that is one coordinate or colour, as in ``columns``; None for others.

    >>> [letter_of(name) for name in ("X", "cartesianY", "Points:2", "diffuse_red", "nx")]
    ['x', 'y', 'z', 'r', None]
    """
    plain = _plain(name)
    if numbered := _NUMBERED.fullmatch(plain):
        return "xyz"[int(numbered[1])]
    if coordinate := _COORDINATE.fullmatch(plain):
        return coordinate[1]
    color = _COLOR.fullmatch(plain)
    return color[1][0] if color else None


def header_letters(names: Sequence[str]) -> str:
    """Letters of the columns that a header names, ``_`` for those that are left out.

    >>> header_letters(["Time (ns)", "X (mm)", "Y (mm)", "Z (mm)"]), header_letters(["E", "N", "h"])
    ('_xyz', 'xyz')
    """
    letters = [letter_of(name) or "_" for name in names]
    if is_survey(names):
        plain = [_plain(name) for name in names]
        for letter, spellings in zip("xyz", (EASTING, NORTHING, HEIGHT)):
            name = named(plain, spellings)
            if name is not None and letter not in letters:
                letters[plain.index(name)] = letter
    return "".join(letters)


def is_survey(names: Iterable[str]) -> bool:
    """Whether the coordinates are easting and northing, above which height points up."""
    plain = [_plain(name) for name in names]
    has_others = {"x", "y"} & {letter_of(name) for name in plain}
    return not has_others and all(named(plain, wanted) for wanted in (EASTING, NORTHING))


def _plain(name: str) -> str:
    """A name in small letters, without quotes, the mark of a comment, and its unit in brackets."""
    return _UNIT.sub("", name.strip().strip("\"'").lower().removeprefix("//").strip())


def letters_of(names: Iterable[str]) -> dict[str, str]:
    """Letter → name of the fields that are coordinates and colours; plain names before others."""
    found: dict[str, str] = {}
    for name in sorted(names, key=len):  # stable: of equal length, the first
        letter = letter_of(name)
        if letter is not None:
            found.setdefault(letter, name)
    return found


def named(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first of the wanted names that is there, whatever its case."""
    lower = {name.lower(): name for name in reversed([*names])}
    return next((lower[name] for name in wanted if name in lower), None)


def from_fields(
    data: Mapping[str, NDArray[Any]], source: str
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Find coordinates and colours among named fields.

    Args:
        data: fields of equally many points: a number each, or some columns.
        source: for messages.

    Returns:
        Coordinates, shape (n_points, n_columns) with x, y, z first, and colours or None, shape
        (n_points, 3).

    Raises:
        InputError: no coordinates; the message has the fields that there are.
    """
    letters = letters_of(data)
    if set("xyz") <= set(letters):
        xyz = _columns(data, letters, "xyz", source)
    else:
        name = named((key for key, value in data.items() if value.ndim == 2), XYZ_NAMES)
        if name is None:
            raise no_coordinates(data, source)
        xyz = data[name]
    return xyz, colors_of(data, source)


def _columns(
    data: Mapping[str, NDArray[Any]], letters: Mapping[str, str], wanted: str, source: str
) -> NDArray[Any]:
    """Fields side by side, shape (n_points, 3).

    Raises:
        InputError: they have different lengths.
    """
    columns = [np.ravel(data[letters[letter]]) for letter in wanted]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        names = ", ".join(letters[letter] for letter in wanted)
        raise InputError(f"{source}: fields {names} have {lengths} values; give as many of each")
    return np.stack(columns, axis=1)


def colors_of(data: Mapping[str, NDArray[Any]], source: str) -> NDArray[Any] | None:
    """Colours among named fields, shape (n_points, 3); None if there are none, or all are 0."""
    letters = letters_of(data)
    name = named(data, RGB_NAMES)
    if set("rgb") <= set(letters):
        rgb = _columns(data, letters, "rgb", source)
    elif name is None:
        return None
    else:
        rgb = data[name]
        if rgb.dtype.kind not in "fiu":
            return rgb  # which make_cloud refuses
        if rgb.ndim < 2 or rgb.shape[-1] == 1:
            rgb = unpack_colors(np.ravel(rgb))
        rgb = rgb[..., :3]
    return rgb if rgb.any() else None  # a field that the writer did not fill


def no_coordinates(names: Iterable[str], source: str) -> InputError:
    """The error for fields without coordinates."""
    names = list(names)
    given = ", ".join(names)[:80] or "no fields"
    if all(named(names, spellings) for spellings in LON_LAT):
        return InputError(
            f"{source} has {given}: degrees are not lengths; project them to metres (x, y, z) first"
        )
    return InputError(f"{source} holds {given}; expected x, y and z, or one of {_some(XYZ_NAMES)}")


def unpack_colors(packed: NDArray[Any]) -> NDArray[np.uint8]:
    """Unpack colours of PCD: 0xRRGGBB or 0xAARRGGBB in the bits of a float, or in an integer.

    Args:
        packed: shape (n_points,).

    Returns:
        red, green and blue, shape (n_points, 3).
    """
    packed = np.atleast_1d(packed)
    if packed.dtype.kind == "f":
        bits = packed.astype(np.float32).view(np.uint32)
    else:
        bits = packed.astype(np.uint32)
    return np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], axis=1).astype(np.uint8)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6])
