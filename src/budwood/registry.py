"""Names to classes, imported on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from budwood.errors import UnknownNameError


class Registry:
    """A table of names and the classes behind them, each imported when first asked for.

    >>> methods = Registry("method", {"adav": "budwood.prune.methods.adav:AdaV"})
    >>> methods.get("adav")  # imports the module now
    <class 'budwood.prune.methods.adav.AdaV'>

    Args:
        kind: what the names stand for, in the singular; used in error messages.
        targets: name to ``"module:attribute"`` or to the class itself.
    """

    def __init__(self, kind: str, targets: Mapping[str, str | type] | None = None) -> None:
        self.kind = kind
        self._targets: dict[str, str | type] = {}
        for name, target in (targets or {}).items():
            self.register(name, target)

    def register(self, name: str, target: str | type) -> None:
        """Add a name.

        Args:
            name: the new name.
            target: ``"module:attribute"``, or the class itself.

        Raises:
            ValueError: the name is taken by another target, or ``target`` has another form.
        """
        if isinstance(target, str) and not all(target.partition(":")):
            raise ValueError(f"{self.kind} {name!r}: target {target!r} must be 'module:attribute'")
        known = self._targets.get(name, target)
        if known != target:
            raise ValueError(f"{self.kind} {name!r} is taken by {known!r}; choose another name")
        self._targets[name] = target

    def get(self, name: str) -> Any:
        """The class behind a name.

        Raises:
            UnknownNameError: no such name; the message has the nearest ones and all known ones.
        """
        target = self._targets.get(name) if isinstance(name, str) else None
        if target is None:
            raise UnknownNameError(self._unknown(name))
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return target

    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self._targets)

    def _unknown(self, name: object) -> str:
        near = difflib.get_close_matches(str(name).lower(), self._targets, n=1, cutoff=0.75)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        return f"unknown {self.kind} {name!r}{hint} known: {', '.join(self._targets)}"

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)
