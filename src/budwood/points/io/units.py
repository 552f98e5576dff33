"""Units of length of files, and how many metres each is."""

from __future__ import annotations

from budwood.errors import InputError

METRES = {
    "m": 1.0,
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


def check_units(units: str) -> None:
    """Refuse an unknown unit of length.

    Args:
        units: a name in ``METRES``, or ``"auto"``.

    Raises:
        InputError: it is neither.
    """
    if units not in METRES and units != AUTO:
        raise InputError(f"units={units!r} is unknown; give one of {', '.join((AUTO, *METRES))}")
