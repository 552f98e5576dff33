"""What commands print: results on standard output, everything else on standard error.

Rich is imported on first use, since `--help` and error messages do without it.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from budwood import records
from budwood.cli.columns import Column
from budwood.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 100_000
_LINE_EVERY = 30.0
"""Seconds between lines of progress where there is no terminal."""


def out() -> Console:
    """Standard output, for results only. In a file or pipe, lines are not wrapped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(file=sys.stdout, highlight=False, width=width)


def notes() -> Console:
    """Standard error, for progress and remarks."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def say(message: str) -> None:
    """Print a remark on standard error."""
    from rich.text import Text

    notes().print(Text(message), soft_wrap=True)


@contextmanager
def warnings_said(
    *beginnings: str, category: type[Warning] = UserWarning, lead: str = ""
) -> Iterator[None]:
    """Print some warnings of the library as remarks, each once, also where others are silent.

    Args:
        beginnings: regular expressions that their messages begin with.
        category: of the warnings.
        lead: what each remark begins with.
    """
    said: set[str] = set()
    others = warnings.showwarning

    def show(message: Warning | str, kind: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(kind, category):
            others(message, kind, *rest, **more)
        elif str(message) not in said:
            said.add(str(message))
            say(f"{lead}{message}")

    with warnings.catch_warnings():
        for beginning in beginnings:
            warnings.filterwarnings("always", message=beginning, category=category)
        warnings.showwarning = show
        yield


def print_text(text: str) -> None:
    """Print text on standard output as it is."""
    out().print(text, markup=False, soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    readable = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=not readable) + "\n")


def print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Iterable[Column],
    title: str = "",
) -> None:
    """Print a table on standard output.

    Args:
        rows: such as those of a record.
        columns: what to show.
        title: above the table.
    """
    from rich.table import Table
    from rich.text import Text

    columns = list(columns)
    table = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        is_text = any(isinstance(row.get(column.key), str) for row in rows)
        heading = column.heading or column.key
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for cells in records.cells_of(rows, {column.key: column.spec for column in columns}):
        table.add_row(*(Text(cell) for cell in cells))
    out().print(table)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show a spinner on standard error if that is a terminal."""
    with notes().status(message):
        yield


@contextmanager
def progress(message: str) -> Iterator[Progress]:
    """Show a progress bar on standard error, or a line every 30 s without a terminal.

    Yields:
        A function that moves the bar.
    """
    console = notes()
    if not console.is_terminal:
        yield _spoken(message)
        return
    from rich import progress as bars

    bar = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(message, total=None)

        def advance(done: int, total: int, note: str = "") -> None:
            shown = f"{message}  {note}" if note else message
            bar.update(task, completed=done, total=total, description=shown)

        yield advance


def _spoken(message: str) -> Progress:
    """Progress in lines, for logs."""
    began = last = time.monotonic()
    first, before = 0, math.inf

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal began, last, first, before
        now = time.monotonic()
        if done < before:  # the first part of the work, or another; a resumed run is ahead
            began, first = now, done
        before = done
        if now - last < _LINE_EVERY:
            return
        last = now
        left = ""
        if done > first:
            minutes = (now - began) / 60 / (done - first) * (total - done)
            left = f", about {minutes:.0f} min left"
        say(f"{message} {done}/{total}{left}{f'  {note}' if note else ''}")

    return advance
