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


def import_with(package: str, module: str) -> None:
    """Import a module as soon as a package has been imported; at once if it is there already.

    The module may be the one whose own import brings the package in. So it has to do all its work
    by being imported.

    Args:
        package: a top-level package, which this does not import.
        module: full name of the module.
    """
    if package in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _Watch(package, module))


class _Watch:
    """A finder that finds a package where the others find it, and imports a module after it."""

    def __init__(self, package: str, module: str) -> None:
        self.package, self.module = package, module

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.package:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]  # earlier ones did not find it
        found = (finder.find_spec(name, path, target) for finder in later)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec  # to find a package is not yet to import it


class _Loader:
    """A package's own loader, with what comes after the import."""

    def __init__(self, own: Any, watch: _Watch) -> None:
        self._own, self._watch = own, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._own
        self._own.exec_module(module)
        if self._watch in sys.meta_path:
            sys.meta_path.remove(self._watch)
            importlib.import_module(self._watch.module)
