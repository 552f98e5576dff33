"""What people and machines see: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from budwood import records

Advance = Any
"""A function (done, total, note), whose note is optional."""


_FILE_WIDTH = 200


def out() -> Console:
    """Standard output: results and nothing else. In a file or pipe no line is broken."""
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(file=sys.stdout, highlight=False, width=width)


def notes() -> Console:
    """Standard error: progress and remarks."""
    return Console(file=sys.stderr, highlight=False)


def say(message: str) -> None:
    """A remark."""
    notes().print(Text(message), soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def print_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]], title: str = ""
) -> None:
    """A table on standard output.

    Args:
        rows: such as those of a record.
        columns: key → heading and format spec, as in :func:`budwood.records.table`.
        title: above it.
    """
    table = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for key, (heading, _) in columns.items():
        is_text = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    specs = {key: spec for key, (_, spec) in columns.items()}
    for cells in records.cells_of(rows, specs):
        table.add_row(*(Text(cell) for cell in cells))
    out().print(table)


@contextmanager
def working(message: str) -> Iterator[None]:
    """A spinner on standard error, where that is a terminal."""
    with notes().status(message):
        yield


@contextmanager
def progress(message: str) -> Iterator[Advance]:
    """A progress bar on standard error, where that is a terminal.

    Yields a function (done, total, note).
    """
    console = notes()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(message, total=None)

        def advance(done: int, total: int, note: str = "") -> None:
            shown = f"{message}  {note}" if note else message
            bar.update(task, completed=done, total=total, description=shown)

        yield advance
