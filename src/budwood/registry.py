"""Names to classes, imported on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from budwood.errors import UnknownNameError

_ALIKE = 0.75
"""How alike two names must be for "did you mean", from 0 to 1: a letter or two may differ."""


@dataclass(frozen=True)
class Entry:
    """A name's line in a table of :mod:`budwood.catalogue`.

    Attributes:
        summary: what it does, in one line.
        source: the paper or code that it comes from.
        facts: column → text: what else a list shows.
        target: where it is defined, ``"module:attribute"``; None where the name alone is known.
    """

    summary: str
    source: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None


class Registry:
    """A table of names and the classes behind them, each imported when first asked for.

    >>> methods = Registry("method", {"adav": "budwood.prune.methods.adav:AdaV"})
    >>> methods.get("adav")  # imports the module now
    <class 'budwood.prune.methods.adav.AdaV'>

    Args:
        kind: what the names stand for, in the singular; used in error messages.
        targets: name to ``"module:attribute"``, to an entry that has it, or to the class or other
            object itself. A name whose entry has no target can be checked and not got.
        elsewhere: names that are known, but not here, to what their error says.
    """

    def __init__(
        self,
        kind: str,
        targets: Mapping[str, Any] | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._elsewhere = dict(elsewhere or {})
        self._targets: dict[str, Any] = {}
        for name, target in (targets or {}).items():
            self.register(name, target.target if isinstance(target, Entry) else target)

    def register(self, name: str, target: Any) -> None:
        """Add a name.

        Args:
            name: the new name.
            target: ``"module:attribute"``, or the class or other object itself.

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
            LookupError: there is no target, only the name.
        """
        self.check(name)
        target = self._targets[name]
        if target is None:
            raise LookupError(f"{self.kind} {name!r} has no target in its table")
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return target

    def check(self, name: object) -> None:
        """Fail if there is no such name; import nothing.

        Raises:
            UnknownNameError: the message has the nearest name and all known ones.
        """
        if not isinstance(name, str) or name not in self._targets:
            raise UnknownNameError(self._unknown(name))

    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self._targets)

    def _unknown(self, name: object) -> str:
        if name in self._elsewhere:
            return f"{self.kind} {name!r} {self._elsewhere[str(name)]}"
        near = difflib.get_close_matches(str(name).lower(), self._targets, n=1, cutoff=_ALIKE)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        return f"unknown {self.kind} {name!r}{hint} known: {', '.join(self._targets)}"

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)
