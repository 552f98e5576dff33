"""`budwood bench`: measure, and show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood import records
from budwood.cli import (
    bench_points,
    bench_points_speed,
    bench_prune,
    bench_speed,
    bench_tune,
    bench_tune_speed,
    tune_eval,
)
from budwood.cli.options import listed

app = typer.Typer(rich_markup_mode=None)
app.command("prune")(bench_prune.bench_prune)
app.command("prune-speed")(bench_speed.bench_speed)
app.command("points")(bench_points.bench_points)
app.command("points-speed")(bench_points_speed.bench_points_speed)
app.command("tune")(bench_tune.bench_tune)
app.command("tune-speed")(bench_tune_speed.bench_tune_speed)

DEFAULT_COLUMNS = {
    "bench prune": bench_prune.MARKDOWN,
    "bench prune-speed": bench_speed.MARKDOWN,
    "bench points": bench_points.MARKDOWN,
    "bench points-speed": bench_points_speed.MARKDOWN,
    "bench tune": bench_tune.MARKDOWN,
    "bench tune-speed": bench_tune_speed.MARKDOWN,
    "tune eval": tune_eval.MARKDOWN,
}


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure accuracy and speed, and show records of it.

    \b
    Example:
      budwood bench prune --scenes 20 --methods adav,random --keep 0.1
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def show(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="A record that bench wrote.")],
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[:FORMAT],…", help="Columns; the format is Python's, such as .1%."
        ),
    ] = None,
) -> None:
    """Print the table of a record, as Markdown.

    \b
    Example:
      budwood bench show record.json --columns method,keep,accuracy:.1%
    """
    found = records.read(record)
    if columns is None:
        chosen = DEFAULT_COLUMNS.get(found.name) or dict.fromkeys(
            found.rows[0] if found.rows else [], ""
        )
    else:
        chosen = _columns(columns, found.rows)
    typer.echo(records.table(found.rows, chosen), nl=False)


def _columns(text: str, rows: list[records.Row]) -> dict[str, str]:
    from budwood.errors import InputError, UnknownNameError

    chosen = dict(_column(item) for item in listed(text))
    known = {key for row in rows for key in row}
    for key, spec in chosen.items():
        if key not in known:
            raise UnknownNameError(f"unknown column {key!r}; known: {', '.join(sorted(known))}")
        try:
            format(1.0, spec)
        except ValueError as error:
            raise InputError(f"format {spec!r} of column {key!r} is unusable: {error}") from error
    return chosen


def _column(item: str) -> tuple[str, str]:
    key, _, spec = item.partition(":")
    return key, spec
