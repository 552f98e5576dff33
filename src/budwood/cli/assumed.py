"""What commands say about how clouds were read: one line, and one for each thing to look at."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from budwood.cli.console import say

if TYPE_CHECKING:
    from budwood.points.io import Assumed

UNITS = {
    "m": "metres",
    "km": "kilometres",
    "cm": "centimetres",
    "mm": "millimetres",
    "micron": "micrometres",
    "in": "inches",
    "ft": "feet",
    "us-ft": "US survey feet",
    "degrees": "degrees",
}
DROPPED = {
    "no return": ("row without a return", "rows without a return"),
    "invalid": ("invalid point", "invalid points"),
    "repeated": ("repeated point", "repeated points"),
    "stray": ("stray point", "stray points"),
    "ground": ("point of the ground", "points of the ground"),
}


def say_assumed(assumed: Mapping[str, Assumed], reading: Mapping[str, Any]) -> None:
    """Say on standard error what was assumed about clouds, and which points were left out.

    Args:
        assumed: by the name of the cloud.
        reading: the options of reading; what they give is not assumed.
    """
    if line := line_of([*assumed.values()], reading):
        say(line)
    noted: dict[str, list[str]] = {}
    for name, about in assumed.items():
        for note in about.notes:
            noted.setdefault(note, []).append(name)
    for note, names in noted.items():
        where = names[0] if len(names) == 1 else f"{len(names)} clouds, such as {names[0]}"
        say(f"note: {where}: {note}")


def line_of(assumed: list[Assumed], reading: Mapping[str, Any]) -> str:
    """One line on all clouds; empty if nothing was assumed or left out."""
    parts = []
    if reading["up"] == "auto":
        parts.append(_counted((f"{about.up or 'y'} up" for about in assumed), "--up"))
    if reading["columns"] is None:
        columns = [f"columns {about.columns}" for about in assumed if about.columns]
        parts.append(_counted(columns, "--columns"))
    if reading.get("units", "auto") == "auto" and any(about.units for about in assumed):
        parts.append(_counted(UNITS.get(about.units or "", "unknown units") for about in assumed))
    said = [f"assumed {', '.join(filter(None, parts))}"] if any(parts) else []
    dropped: Counter[str] = Counter()
    for about in assumed:
        dropped.update(about.dropped)
    if dropped:
        keep = " (--keep-strays)" if "stray" in dropped else ""
        said.append(f"left out {', '.join(_many(*item) for item in dropped.items())}{keep}")
    return "; ".join(said)


def json_of(assumed: Assumed | None) -> dict[str, Any] | None:
    """The same for one cloud, for ``--json``."""
    return None if assumed is None else dataclasses.asdict(assumed)


def _counted(values: Iterable[str], option: str | None = None) -> str:
    """Each value, with the number of clouds it holds for where there are several values."""
    counts = Counter(values)
    if not counts:
        return ""
    several = len(counts) > 1
    said = ", ".join(f"{value} ({n})" if several else value for value, n in counts.most_common())
    return f"{said} ({option})" if option else said


def _many(reason: str, n: int) -> str:
    one, several = DROPPED.get(reason, (reason, reason))
    return f"{n:,} {one if n == 1 else several}"
