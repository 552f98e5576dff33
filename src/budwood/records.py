"""Benchmark records: one JSON file per run, from which tables and plots are made.

A record holds command, seed, commit, versions and hardware of its numbers. It holds nothing that
could identify the machine: no host name, no user, no directory.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

import budwood
from budwood.errors import InputError, OutputError
from budwood.files import read_json, write_text

Row = dict[str, Any]

FORMAT = 1
"""Version of the file format, raised when a reader of old files would be misled."""
STATUSES = ("complete", "partial", "failed")
RESULTS = "benchmarks/results"
"""Where the project keeps its records."""


@dataclass(frozen=True)
class Record:
    """One run of a benchmark.

    Attributes:
        name: what was run, such as ``"bench prune"``.
        command: the command line that repeats it.
        seed: seed of everything drawn, None if nothing was.
        config: the options of the run, as JSON values.
        rows: the results, one dict per row of the table.
        status: ``"complete"``, ``"partial"`` or ``"failed"``.
        created: start of the run, UTC, ISO 8601.
        git: ``commit`` (None outside a checkout) and ``dirty`` (tracked files have changed,
            records in ``RESULTS`` apart).
        versions: python, torch, transformers and budwood.
        hardware: cpu, cores, threads (that torch uses) and gpu.
    """

    name: str
    command: str
    seed: int | None
    config: dict[str, Any]
    rows: list[Row]
    status: str = "complete"
    created: str = ""
    git: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise InputError(f"status {self.status!r} is unknown; give complete, partial or failed")


_KINDS: dict[str, type] = {
    "name": str,
    "command": str,
    "created": str,
    "config": dict,
    "git": dict,
    "versions": dict,
    "hardware": dict,
}
_JSON_NAMES = {str: "text", dict: "an object"}


def new_record(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    seed: int | None,
    config: Mapping[str, Any],
    command: str | None = None,
    status: str = "complete",
) -> Record:
    """Make a record of this run, with its commit, versions and hardware.

    Args:
        name: what was run.
        rows: the results.
        seed: seed of everything drawn.
        config: the options of the run.
        command: the command line; by default that of this process, without directories.
        status: ``"complete"``, ``"partial"`` or ``"failed"``.
    """
    return Record(
        name=name,
        command=command or _command(),
        seed=seed,
        config=dict(config),
        rows=[dict(row) for row in rows],
        status=status,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        git=git_state(),
        versions=_versions(),
        hardware=_hardware(),
    )


def write(record: Record, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a record as JSON, whole or not at all.

    Args:
        record: what to write.
        path: the file; missing directories are made.
        overwrite: replace a file that exists.

    Returns:
        The path.

    Raises:
        OutputError: the file exists and ``overwrite`` is off, or it cannot be written.
        InputError: a value is neither JSON nor a finite number.
    """
    target = Path(path)
    try:
        text = json.dumps(dataclasses.asdict(record), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"record {record.name!r} is not JSON: {error}") from error
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another name, or overwrite it on purpose")
    write_text(target, text)
    return target


def read(path: str | os.PathLike[str]) -> Record:
    """Read a record.

    Raises:
        InputError: there is no such file, or it is not a record of a known format.
    """
    data = read_json(Path(path))
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
        raise InputError(f"{path} is not a benchmark record: it has no list of rows")
    if data.get("format") != FORMAT:
        raise InputError(f"{path} has format {data.get('format')!r}; this version reads {FORMAT}")
    if wrong := _wrong_in(data):
        raise InputError(f"{path} is malformed: {wrong}")
    return Record(**data)


def _wrong_in(data: Mapping[str, Any]) -> str | None:
    """What makes a JSON object no record; None if it is one."""
    fields = {one.name: one for one in dataclasses.fields(Record)}
    for key, value in data.items():
        if key not in fields:
            return f"{key!r} is no field of a record"
        kind = _KINDS.get(key)
        if kind and not isinstance(value, kind):
            return f"{key!r} is {value!r}, not {_JSON_NAMES[kind]}"
    if data.get("status", "complete") not in STATUSES:
        return f"its status is {data['status']!r}, none of {', '.join(STATUSES)}"
    for row in data["rows"]:
        if not isinstance(row, dict):
            return "a row is not an object"
    if not _is_finite(data):
        return "a number in it is infinite or NaN"
    for name, one in fields.items():
        has_default = one.default is not MISSING or one.default_factory is not MISSING
        if name not in data and not has_default:
            return f"it has no {name!r}"
    return None


def _is_finite(value: Any) -> bool:
    """Whether all numbers in a JSON value are finite."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Format rows as a Markdown table.

    Args:
        rows: dicts, such as ``record.rows``; a value that is missing or None leaves its cell empty.
        columns: the keys to show, in order; or key → format spec, such as ``{"accuracy": ".1%"}``.

    Returns:
        The table, numbers aligned to the right, ending in a newline.
    """
    rows = list(rows)
    cells = cells_of(rows, columns)
    numeric = [all(_is_number(row.get(key)) for row in rows) for key in columns]
    rule = ["---:" if right else "---" for right in numeric]
    return "".join(f"| {' | '.join(line)} |\n" for line in [list(columns), rule, *cells])


def cells_of(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]
) -> list[list[str]]:
    """The cells of :func:`table` as plain text, for other renderers; arguments as there."""
    specs = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "")
    return [[_cell(row.get(key), spec) for key, spec in specs.items()] for row in rows]


def spread(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], key: str
) -> tuple[list[Row], dict[str, str]]:
    """Put rows side by side: the last column once for each value of a key.

    Args:
        rows: dicts, such as ``record.rows``.
        columns: key → format spec; rows that agree in all but the last become one row.
        key: its values become columns, in the order in which they occur.

    Returns:
        Rows and columns for :func:`table`.

    Raises:
        InputError: two rows would have one cell.
    """
    *shared, last = columns
    merged: dict[tuple[Any, ...], Row] = {}
    specs: dict[str, str] = {column: columns[column] for column in shared}
    for row in rows:
        values = tuple(row.get(column) for column in shared)
        target = merged.setdefault(values, dict(zip(shared, values)))
        name = str(row.get(key))
        if name in target:
            said = ", ".join(str(value) for value in values)
            raise InputError(
                f"two rows are {said or 'alike'} with {key} {name}; add a column that tells them "
                "apart, or choose rows"
            )
        target[name], specs[name] = row.get(last), columns[last]
    return list(merged.values()), specs


def git_state(directory: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Commit and cleanliness of the checkout that holds this package, or ``directory``.

    Returns:
        ``{"commit": str | None, "dirty": bool | None}``; None outside a checkout of the project.
    """
    here = Path(directory) if directory else Path(__file__).resolve().parent
    # A tracked file tells budwood's checkout from an unrelated one around an installed package.
    known = "." if directory else Path(__file__).name
    if _git(here, "ls-files", "--error-unmatch", known) is None:
        return {"commit": None, "dirty": None}
    commit = _git(here, "rev-parse", "HEAD")
    besides = f":(exclude,top){RESULTS}"  # a run that writes its record as it goes on is clean
    changes = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":/", besides)
    return {"commit": commit, "dirty": None if commit is None else bool(changes)}


def _git(directory: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=directory, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _command() -> str:
    program = Path(sys.argv[0]).name
    return shlex.join([program, *(_without_directory(arg) for arg in sys.argv[1:])])


def _without_directory(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "budwood": budwood.__version__,
    }
    for package in ("torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _hardware() -> dict[str, Any]:
    import torch

    from budwood.halves import multiplies

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16": multiplies(torch.bfloat16),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cell(value: Any, spec: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = format(value, spec) if spec and _is_number(value) else str(value)
    return text.replace("|", r"\|")


def is_finite(value: object) -> bool:
    """Whether a value is a number that can be drawn: no truth value, NaN or infinity."""
    return _is_number(value) and math.isfinite(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
