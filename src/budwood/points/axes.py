"""The axis that points up, in all six directions, and turning a cloud from one to another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError

AXES = ("x", "-x", "y", "-y", "z", "-z")
AUTO = "auto"
"""The axis by the format of the file."""


def check_up(axis: str, *, auto: bool = False) -> None:
    """Refuse an unknown name of the upward axis.

    Args:
        axis: to check.
        auto: whether ``"auto"`` is allowed as well.

    Raises:
        InputError: it is not in ``AXES``.
    """
    if axis not in AXES and not (auto and axis == AUTO):
        names = ", ".join((AUTO, *AXES) if auto else AXES)
        raise InputError(f"up={axis!r} is unknown; give one of {names}")


def turn_up(current: str, wanted: str) -> NDArray[np.float64]:
    """The rotation that makes another axis point up, shape (3, 3); see :func:`to_up`."""
    check_up(current)
    check_up(wanted)
    old, new = _unit(current), _unit(wanted)
    if current == wanted:
        return np.eye(3)
    if current[-1] == wanted[-1]:
        kept = _unit("y" if wanted[-1] == "x" else "x")
        return 2 * np.outer(kept, kept) - np.eye(3)
    third = np.outer(np.cross(old, new), np.cross(old, new))
    return np.outer(new, old) - np.outer(old, new) + third


def to_up(xyz: NDArray[np.float64], current: str, wanted: str) -> NDArray[np.float64]:
    """Turn a cloud so that another axis points up, without mirroring it.

    The turn is the shortest: a quarter about the axis that neither names, or a half about x (about
    y where x points up or down).

    Args:
        xyz: shape (n, 3).
        current: the axis that points up, in ``AXES``.
        wanted: the axis that points up in the result, in ``AXES``.

    Raises:
        InputError: another axis.
    """
    turn = turn_up(current, wanted)
    return xyz if current == wanted else xyz @ turn.T


def from_turned(up: str) -> NDArray[np.float64]:
    """From a frame that was turned so that z points up, back to its own axes, shape (4, 4).

    Args:
        up: the axis that points up in the frame, in ``AXES``.
    """
    back = np.eye(4)
    back[:3, :3] = turn_up(up, "z").T
    return back


def _unit(axis: str) -> NDArray[np.float64]:
    return np.eye(3)["xyz".index(axis[-1])] * (-1.0 if axis[0] == "-" else 1.0)
