"""Matplotlib figures: made without global state, saved with one clear line where that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budwood import optional
from budwood.errors import OutputError


def need_matplotlib() -> None:
    """Fail before slow work whose result is to be drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    optional.check("matplotlib", "drawing a plot")


def new_figure(width: float, height: float) -> Any:
    """An empty figure, apart from pyplot: no global state, no GUI.

    Args:
        width: inches.
        height: inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 150) -> Path:
    """Write a figure; an existing file is replaced.

    Args:
        figure: of :func:`new_figure`.
        path: its suffix gives the format.
        dpi: dots per inch.

    Raises:
        OutputError: it cannot be written, or the suffix is that of no format.
    """
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except ValueError as error:  # an unknown suffix
        raise OutputError(f"cannot write {path}: {error}") from error
    return path
