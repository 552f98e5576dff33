"""`budwood bench`: run benchmarks, and print the tables of their records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from budwood import records
from budwood.cli import options, tune_eval
from budwood.cli.bench import (
    points,
    points_speed,
    prune,
    prune_speed,
    serve,
    tune,
    tune_speed,
)
from budwood.cli.commands import App
from budwood.cli.console import say
from budwood.cli.output import reserve_picture
from budwood.errors import InputError, UnknownNameError
from budwood.figures import need_matplotlib
from budwood.files import write_whole

app = App()
app.command("prune")(prune.bench_prune)
app.command("prune-speed")(prune_speed.bench_speed)
app.command("points")(points.bench_points)
app.command("points-speed")(points_speed.bench_points_speed)
app.command("tune")(tune.bench_tune)
app.command("tune-speed")(tune_speed.bench_tune_speed)
app.command("serve")(serve.bench_serve)

_OPEN = re.compile(r"[^:]*:(.?[<>=^])?[-+ ]?#?0?\d*")
"""A column and the beginning of its format, which a comma can follow."""
_REST = re.compile(r"(\.\d+)?[bcdeEfFgGnosxX%]?")
"""What can follow a comma in a format of Python."""

COLUMNS = {
    "bench prune": prune.COLUMNS,
    "bench prune-speed": prune_speed.COLUMNS,
    "bench points": points.COLUMNS,
    "bench points-speed": points_speed.COLUMNS,
    "bench tune": tune.COLUMNS,
    "bench tune run": tune.COLUMNS_OF_RUNS,
    "bench tune-speed": tune_speed.COLUMNS,
    "bench serve": serve.COLUMNS,
    "tune eval": tune_eval.COLUMNS,
}
"""Columns of each kind of record, by its name."""


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure accuracy and speed, and print the tables of earlier measurements.

    Each benchmark prints a table, and with --out also writes a record that `bench show` reads.

    \b
    Examples:
      budwood bench prune --scenes 20 --methods adav,random --keep 0.1 --out record.json
      budwood bench show record.json
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def show(
    record: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD...", help="Records, or folders with a record.json somewhere inside."
        ),
    ],
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[:FORMAT],…",
            help="Columns to show; FORMAT is Python's, such as .1% or ,.0f. By default those of "
            "the table that the benchmark itself prints.",
        ),
    ] = None,
    where: Annotated[
        str,
        typer.Option(metavar="KEY=VALUE[|VALUE…],…", help="Only rows with one of these values."),
    ] = "",
    across: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Repeat the last column for each value of this key."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --across: draw it too, one curve per row."),
    ] = None,
    force: options.Force = False,
) -> None:
    """Print the rows of one or more records as a Markdown table.

    \b
    Examples:
      budwood bench show record.json --columns method,keep,accuracy:.1%
      budwood bench show record.json --columns method,unseen_top1:.1% --across points
      budwood bench show comparison/runs --where seed=0
    """
    read = read_all(record)
    rows = _matching([row for each in read.values() for row in each.rows], where)
    if not rows:
        raise InputError(f"there is nothing to show: {', '.join(map(str, read))} has no rows")
    if columns is not None and not options.listed(columns):
        raise InputError(f"--columns {columns!r} names none; leave it out for the usual ones")
    shown = _usual(read, rows) if columns is None else _parse_columns(columns, rows)
    table = rows, shown
    if across is not None:
        _check_key(across, rows)
        if columns is None or across in shown:
            raise InputError(
                f"--across {across} needs --columns without {across}, of which the last is repeated"
            )
        table = records.spread(rows, shown, across)
    if plot is not None:
        _draw(rows, list(shown), across, plot, force)
    typer.echo(records.table(*table), nl=False)


def read_all(paths: Iterable[Path]) -> dict[Path, records.Record]:
    """The records themselves, and those of folders; says which are not complete.

    A folder stands for its ``record.json``, or if it has none, for all those inside.

    Raises:
        InputError: a folder has no record, a file is none, or one is given twice.
    """
    read: dict[Path, records.Record] = {}
    known: set[str] = set()
    for path in paths:
        for file in _files_of(path):
            place = os.path.realpath(file)  # which lets links that lead nowhere pass
            if place in known:
                raise InputError(f"{file} is given twice; give each record once")
            known.add(place)
            read[file] = records.read(file)
            if read[file].status != "complete":
                say(f"{file} is not complete")
    return read


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    own = path / "record.json"
    files = [own] if own.is_file() else sorted(path.rglob("record.json"))
    if not files:
        raise InputError(f"there is no record.json in {path}")
    return files


def _usual(read: Mapping[Path, records.Record], rows: list[records.Row]) -> dict[str, str]:
    """The columns of the table that the benchmark itself prints, as far as a row has a value.

    Raises:
        InputError: the records are of several kinds.
    """
    of_kind = {one.name: path for path, one in read.items()}
    if len(of_kind) > 1:
        named = ", ".join(f"{name} ({path})" for name, path in of_kind.items())
        raise InputError(f"records of several kinds: {named}; show one kind, or give --columns")
    (name,) = of_kind
    usual = COLUMNS[name].of_record() if name in COLUMNS else dict.fromkeys(rows[0], "")
    filled = {key for row in rows for key, value in row.items() if value is not None}
    shown = {key: spec for key, spec in usual.items() if key in filled}
    return shown or dict.fromkeys(sorted(filled), "")


def _matching(rows: list[records.Row], where: str) -> list[records.Row]:
    """The rows that meet every condition."""
    for condition in options.listed(where):
        key, equals, value = condition.partition("=")
        if not equals:
            raise InputError(f"--where {condition!r}: write key=value")
        _check_key(key, rows)
        values = sorted({str(row.get(key)) for row in rows})
        rows = [row for row in rows if str(row.get(key)) in value.split("|")]
        if not rows:
            raise InputError(f"no row has {key}={value}; there are {', '.join(values)}")
    return rows


def _draw(
    rows: list[records.Row], columns: list[str], across: str | None, path: Path, force: bool
) -> None:
    """Draw the second of two columns along a key, one curve per value of the first."""
    if across is None or len(columns) != 2:
        raise InputError(
            "--plot needs --across, and two --columns: of the curves, and their height"
        )
    if not all(isinstance(row.get(across), int | float) and row[across] > 0 for row in rows):
        raise InputError(f"--plot needs numbers above 0 along {across}")
    reserve_picture(path, force)
    need_matplotlib()
    from budwood.bench.plots import plot_lines

    by, height = columns
    write_whole(path, lambda part: plot_lines(rows, part, x=across, y=height, by=by, log=True))
    say(f"wrote {path}")


def _check_key(key: str, rows: list[records.Row]) -> None:
    known = {key for row in rows for key in row}
    if key not in known:
        raise UnknownNameError(
            f"unknown column {key!r}; known: {', '.join(sorted(known)) or 'none'}"
        )


def _parse_columns(text: str, rows: list[records.Row]) -> dict[str, str]:
    """Key → format, of ``KEY[:FORMAT],…``."""
    columns: dict[str, str] = {}
    for item in _items(text, {key for row in rows for key in row}):
        key, _, spec = item.partition(":")
        _check_key(key, rows)
        if key in columns:
            raise InputError(f"--columns has {key} twice; give it once")
        try:
            records.cells_of(rows, {key: spec})
        except ValueError as error:
            raise InputError(f"format {spec!r} of column {key!r} is unusable: {error}") from error
        columns[key] = spec
    return columns


def _items(text: str, known: set[str]) -> list[str]:
    """Split columns at commas, but for those that belong to a format, as in ``n:,.1f``."""
    items: list[str] = []
    for part in text.split(","):
        if items and _OPEN.fullmatch(items[-1]) and _REST.fullmatch(part) and part not in known:
            items[-1] += f",{part}"
        else:
            items.append(part.strip())
    return [item for item in items if item]
