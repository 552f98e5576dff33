"""Units of length: how many metres each is, and those that files and names of columns state."""

from __future__ import annotations

import re
from collections.abc import Sequence

from budwood.errors import InputError
from budwood.points.io.cloud import Cloud
from budwood.points.io.fields import UNIT_BEHIND, header_letters

METRES = {
    "m": 1.0,
    "km": 1e3,
    "cm": 1e-2,
    "mm": 1e-3,
    "micron": 1e-6,
    "in": 0.0254,
    "ft": 0.3048,
    "us-ft": 1200 / 3937,
}
"""Metres in a unit of length; ``"us-ft"`` is the US survey foot."""
AUTO = "auto"
"""The unit that the file names, or that its format has; metres if neither is known."""
SPELLINGS = {
    **{unit: unit for unit in METRES},
    **dict.fromkeys(("metre", "metres", "meter", "meters"), "m"),
    **dict.fromkeys(("kilometre", "kilometres", "kilometer", "kilometers"), "km"),
    **dict.fromkeys(("centimetre", "centimetres", "centimeter", "centimeters"), "cm"),
    **dict.fromkeys(("millimetre", "millimetres", "millimeter", "millimeters"), "mm"),
    **dict.fromkeys(
        ("microns", "micrometre", "micrometres", "micrometer", "micrometers"), "micron"
    ),
    **dict.fromkeys(("inch", "inches"), "in"),
    **dict.fromkeys(("µm", "μm", "um"), "micron"),
    **dict.fromkeys(("us ft", "us-foot", "us foot", "us survey foot", "us survey feet"), "us-ft"),
    **dict.fromkeys(("usft", "ftus", "ft us", "survey feet"), "us-ft"),
    **dict.fromkeys(("foot", "feet"), "ft"),
}
"""How units are written → their names in ``METRES``."""
DEGREES = ("deg", "degree", "degrees", "°")
_UNIT = re.compile(rf"[(\[]\s*([^)\]]*?)\s*[)\]]$|[ _]({UNIT_BEHIND})$")


def check_units(units: str) -> None:
    """Refuse an unknown unit of length.

    Args:
        units: a name in ``METRES``, or ``"auto"``.

    Raises:
        InputError: it is neither.
    """
    if units not in METRES and units != AUTO:
        raise InputError(f"units={units!r} is unknown; give one of {', '.join((AUTO, *METRES))}")


def unit_of(name: str) -> str | None:
    """The unit in the name of a column, in small letters; None without one.

    >>> unit_of("X (mm)"), unit_of("y_ft"), unit_of("z")
    ('mm', 'ft', None)
    """
    found = _UNIT.search(name.strip().strip("\"'").lower())
    return (found[1] or found[2]) if found else None


def with_named_units(cloud: Cloud, names: Sequence[str]) -> Cloud:
    """The same points, with the unit of length that the names of their columns state, if any.

    Words behind a unit, such as those of "m a.s.l.", do not count. A note says if a unit is not
    known.

    Args:
        cloud: in the units of its file.
        names: of the columns of the file.

    Raises:
        InputError: the coordinates have different units, or are degrees.
    """
    letters = header_letters(names)
    units = {unit_of(name) for name, letter in zip(names, letters) if letter in "xyz"} - {None}
    if units & {*DEGREES}:
        raise InputError(
            f"{cloud.source} has coordinates in degrees, which are no lengths; project them to "
            "metres (x, y, z) first"
        )
    named = sorted(filter(None, units))
    lengths = {_length_of(unit) for unit in named} - {None}
    if len(lengths) > 1:
        raise InputError(
            f"{cloud.source} names several units of its coordinates ({', '.join(named)}); use one"
        )
    if lengths:
        return cloud.assuming(units=lengths.pop())
    if named:
        return cloud.noting(f"the unit of its coordinates, {named[0]!r}, is not known and not used")
    return cloud


def _length_of(unit: str) -> str | None:
    """The unit of length of a text, or of its first word; None if there is none."""
    return SPELLINGS.get(unit) or SPELLINGS.get(unit.split()[0] if unit else "")
