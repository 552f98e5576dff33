"""`budwood bench points-speed`: the time that adapters and grouping take."""

from __future__ import annotations

from typing import Annotated

import typer

from budwood import records
from budwood.cli import clouds, options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import working
from budwood.cli.results import Results

COLUMNS = Columns(
    Column("what"),
    Column("points"),
    Column("clouds_per_s", ".1f"),
    Column("over_frozen", ".3f"),
    Column("over_loop", ".1f"),
)


def bench_points_speed(
    points: Annotated[str, typer.Option(metavar="N,…", help="Numbers of points.")] = "1024,64",
    batch: Annotated[int, typer.Option(min=1, help="Clouds at once.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs everything once.")] = 20,
    encoder: clouds.Encoder = "sprout",
    checkpoint: clouds.Checkpoint = None,
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure clouds per second: the frozen encoder, adapters (fused and not), and grouping.

    Ratios are taken within a round, and their medians shown.

    \b
    Example:
      budwood bench points-speed --points 1024,64 --out speed.json
    """
    from budwood.bench.points_speed import encoder_rows, grouping_rows

    counts = options.counts_of(points, "points")
    results = Results(out, force, json)
    model = clouds.load(encoder, checkpoint, "cpu")
    rows = []
    with working("measuring"):
        for n_points in counts:
            rows += encoder_rows(model, n_points, batch, repeats)
            rows += grouping_rows(model.grouping, n_points, batch, repeats)
    config = {"encoder": model.name, "points": counts, "batch": batch, "repeats": repeats}
    record = records.new_record("bench points-speed", rows, seed=0, config=config)
    results.publish(record, COLUMNS)
