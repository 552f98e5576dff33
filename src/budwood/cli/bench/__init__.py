"""`budwood bench`: measure, and show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood import records
from budwood.cli import options, tune_eval
from budwood.cli.bench import points, points_speed, prune, prune_speed, tune, tune_speed
from budwood.cli.console import say
from budwood.cli.output import reserve_picture
from budwood.errors import InputError, UnknownNameError
from budwood.figures import need_matplotlib
from budwood.files import write_whole

app = typer.Typer(rich_markup_mode=None)
app.command("prune")(prune.bench_prune)
app.command("prune-speed")(prune_speed.bench_speed)
app.command("points")(points.bench_points)
app.command("points-speed")(points_speed.bench_points_speed)
app.command("tune")(tune.bench_tune)
app.command("tune-speed")(tune_speed.bench_tune_speed)

DEFAULT_COLUMNS = {
    "bench prune": prune.MARKDOWN,
    "bench prune-speed": prune_speed.MARKDOWN,
    "bench points": points.MARKDOWN,
    "bench points-speed": points_speed.MARKDOWN,
    "bench tune": tune.MARKDOWN,
    "bench tune run": tune.MARKDOWN_OF_RUNS,
    "bench tune-speed": tune_speed.MARKDOWN,
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
    record: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD...", help="Records that bench wrote, or folders with record.json below."
        ),
    ],
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[:FORMAT],…", help="Columns; the format is Python's, such as .1%."
        ),
    ] = None,
    where: Annotated[
        str,
        typer.Option(metavar="KEY=VALUE[|VALUE…],…", help="Rows with one of these values alone."),
    ] = "",
    across: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The last column once for each value of this key."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --across, also draw that, a curve for each row."),
    ] = None,
    force: options.Force = False,
) -> None:
    """Print the table of a record, or of several, as Markdown.

    \b
    Example:
      budwood bench show record.json --columns method,keep,accuracy:.1%
      budwood bench show record.json --columns method,unseen_top1:.1% --across points
      budwood bench show comparison/runs --where seed=0
    """
    found = [records.read(file) for one in record for file in _files(one)]
    rows = _chosen([row for one in found for row in one.rows], where)
    if columns is None:
        shown = DEFAULT_COLUMNS.get(found[0].name) or dict.fromkeys(rows[0] if rows else [], "")
    else:
        shown = _columns(columns, rows)
    table = rows, shown
    if across is not None:
        _check_known(across, rows)
        table = records.spread(rows, shown, across)
    if plot is not None:
        _draw(rows, list(shown), across, plot, force)
    typer.echo(records.table(*table), nl=False)


def _files(path: Path) -> list[Path]:
    """A record, or all that lie in a folder, by their paths."""
    if not path.is_dir():
        return [path]
    files = sorted(path.rglob("record.json"))
    if not files:
        raise InputError(f"there is no record.json in {path}")
    return files


def _chosen(rows: list[records.Row], where: str) -> list[records.Row]:
    """Rows that have the values that were asked for."""
    for item in options.listed(where) if where else ():
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--where {item!r} is no condition; write key=value")
        _check_known(key, rows)
        values = sorted({str(row.get(key)) for row in rows})
        rows = [row for row in rows if str(row.get(key)) in value.split("|")]
        if not rows:
            raise InputError(f"no row has {key}={value}; there are {', '.join(values)}")
    return rows


def _draw(
    rows: list[records.Row], columns: list[str], across: str | None, path: Path, force: bool
) -> None:
    """Draw the second of two columns along a key, a curve for each value of the first."""
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


def _check_known(key: str, rows: list[records.Row]) -> None:
    known = {key for row in rows for key in row}
    if key not in known:
        raise UnknownNameError(f"unknown column {key!r}; known: {', '.join(sorted(known))}")


def _columns(text: str, rows: list[records.Row]) -> dict[str, str]:
    chosen = dict(_column(item) for item in options.listed(text))
    for key, spec in chosen.items():
        _check_known(key, rows)
        try:
            format(1.0, spec)
        except ValueError as error:
            raise InputError(f"format {spec!r} of column {key!r} is unusable: {error}") from error
    return chosen


def _column(item: str) -> tuple[str, str]:
    key, _, spec = item.partition(":")
    return key, spec
