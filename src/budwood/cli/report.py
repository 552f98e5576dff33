"""`budwood report`: benchmark records as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from budwood import records
from budwood.checks import need_at_least
from budwood.cli import bench, options
from budwood.cli.console import say, working
from budwood.cli.output import reserve
from budwood.errors import InputError, OutputError
from budwood.figures import need_matplotlib
from budwood.files import write_text
from budwood.loading import EMBEDDED_VLMS, SPROUT, SPROUT_256

if TYPE_CHECKING:
    from budwood.bench.report import Column, Example

METHODS_SHOWN = 6
"""Methods in an example picture; the help of ``--examples`` says how many."""


def report(
    record: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD...", help="Records, or folders with a record.json somewhere inside."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page, which ends in .html.")],
    examples: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Ask the embedded model N questions of the first pruning record again "
            "and show which tokens its first six methods keep.",
        ),
    ] = 0,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Results",
    force: options.Force = False,
) -> None:
    """Write benchmark records as one HTML page: curves, tables, and where the numbers come from.

    The page needs no other file and no network.

    \b
    Example:
      budwood report prune.json prune-speed.json --out report.html --examples 3
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{out} must end in .html or .htm")
    need_at_least(0, examples=examples)
    need_matplotlib()
    given = bench.read_all(record)
    read = dict(zip(_names([*given]), given.values(), strict=True))
    reserve(out, force, given)
    from budwood.bench.report import page

    shown = _examples(list(read.values()), examples) if examples else ()
    columns = {name: _columns(name) for name in bench.COLUMNS}
    write_text(out, page(read, columns, shown, title))
    say(f"wrote {out}")


def _names(files: list[Path]) -> list[str]:
    """Short names that tell the files apart."""
    stems = [file.stem if file.stem != "record" else file.parent.name for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]


def _columns(name: str) -> list[Column]:
    from budwood.bench.report import Column

    headings = bench.COLUMNS[name].headings()
    specs = bench.COLUMNS[name].of_record()
    return [Column(key, spec, headings[key]) for key, spec in specs.items()]


def _examples(read: list[records.Record], number: int) -> Iterator[Example]:
    """Questions of a record's scenes, answered again at its smallest budget when asked for."""
    pruning = next((record for record in read if record.name == "bench prune"), None)
    if pruning is None or pruning.config.get("model") not in EMBEDDED_VLMS:
        raise InputError(
            f"--examples {number} needs a record of `budwood bench prune` on the embedded model"
        )
    from budwood.bench.prune.examples import examples_of
    from budwood.cli.models import load
    from budwood.fingerprint import fingerprint_of

    # Records from before the high-resolution layout call the small one sprout.
    small = not pruning.config.get("high_resolution", False)
    loaded = load(SPROUT_256 if small else SPROUT)
    if pruning.config.get("weights") not in (None, fingerprint_of(loaded.model)):
        raise InputError(
            f"--examples {number} asks the weights that ship today, and the record is of others; "
            "leave --examples out"
        )
    with working("answering"):
        yield from examples_of(loaded.model, loaded.processor, pruning, number, METHODS_SHOWN)
