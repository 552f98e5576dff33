"""Imports on first use, so that importing a package stays fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package's ``__getattr__``, ``__dir__`` and ``__all__`` (PEP 562).

    Example::

        __getattr__, __dir__, __all__ = lazy_exports(__name__, {"attach": "session"})

    Args:
        package: name of the package, ``__name__``.
        homes: exported name → submodule that defines it, relative to the package.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names, sorted(homes)


def after_import(package: str, call: Callable[[], None]) -> None:
    """Call something when a package has been imported; at once if it is there already.

    Args:
        package: a top-level package, which this does not import.
        call: takes and gives nothing.
    """
    if package in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(package, call))


class _Watch:
    """A finder that finds what the others find, and calls something behind the import."""

    def __init__(self, package: str, call: Callable[[], None]) -> None:
        self.package, self.call = package, call

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.package:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        """Have this loader call behind its work. To find a package is not to import it."""
        run = loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            del loader.exec_module  # its class's own from now on
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.call()

        loader.exec_module = run_and_call
