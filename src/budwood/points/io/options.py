"""How files are read."""

from __future__ import annotations

from dataclasses import dataclass

from budwood.errors import InputError


@dataclass(frozen=True)
class ReadOptions:
    """Options of every reader; each reads those that mean something for its format.

    Attributes:
        columns: letters of the columns of a table, such as ``"xyz_rgb"``; None finds out.
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
        if not 1 <= self.n_points <= 100_000_000:
            raise InputError(f"n_points={self.n_points} is outside 1…100,000,000")
        if self.seed < 0:
            raise InputError(f"seed={self.seed} must be 0 or more")
        if self.columns is not None and not names_once(self.columns):
            raise InputError(
                f"columns={self.columns!r} must have x, y, z once, r, g, b once or not at all, and "
                "_ for what is left out"
            )


def names_once(columns: str) -> bool:
    """Whether letters of columns have x, y, z once, and r, g, b once or not at all."""
    return sorted(columns.replace("_", "")) in (sorted("xyz"), sorted("xyzrgb"))
