"""`budwood bench points-speed`: whole paths, adapters, grouping, large clouds and frames."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from budwood import records
from budwood.cli import clouds, options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import working
from budwood.cli.results import Results
from budwood.errors import InputError, InputWarning

if TYPE_CHECKING:
    from budwood.points import PointEncoder

COLUMNS = Columns(
    Column("encoder", only="terminal"),
    Column("what"),
    Column("points"),
    Column("clouds_per_s", ".1f"),
    Column("over_frozen", ".3f"),
    Column("over_loop", ".1f"),
    Column("seconds", ".3f", only="terminal"),
)


def bench_points_speed(
    points: Annotated[str, typer.Option(metavar="N,…", help="Numbers of points.")] = "1024,64",
    batch: Annotated[int, typer.Option(min=1, help="Clouds at once.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs everything once.")] = 20,
    encoders: Annotated[
        str, typer.Option("--encoder", metavar="NAME,…", help="Some of `budwood ls encoders`.")
    ] = "sprout",
    checkpoint: clouds.Checkpoint = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Random weights: speed does not depend on them.")
    ] = False,
    paths: Annotated[
        bool, typer.Option("--paths", help="Time whole paths instead, from file to label.")
    ] = False,
    large: Annotated[
        int, typer.Option(min=0, help="Time samplers and groups on a cloud of so many points.")
    ] = 0,
    frame: Annotated[
        bool, typer.Option("--frame", help="Time `budwood scan` on a frame of 120,000 points.")
    ] = False,
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure clouds per second: the frozen encoder, adapters (fused and not), and grouping.

    --paths measures the time from files to labels, compared with a plain loop. --large times
    samplers and groups on a large cloud, and --frame times `budwood scan` on a frame. Ratios are
    taken within a round, and the table shows their medians.

    \b
    Examples:
      budwood bench points-speed --points 1024,64 --out speed.json
      budwood bench points-speed --paths --points 64,10000 --encoder ulip,uni3d-ti --untrained
      budwood bench points-speed --large 1000000 --frame --repeats 3
    """
    from budwood.bench.points_paths import frame_rows, large_rows, path_rows
    from budwood.bench.points_speed import encoder_rows, grouping_rows

    counts = options.counts_of(points, "points")
    names = options.listed(encoders)
    if checkpoint is not None and (untrained or len(names) > 1):
        raise InputError("--checkpoint is for one --encoder, without --untrained")
    results = Results(out, force, json, reads=[checkpoint])
    rows: list[records.Row] = []
    with working("measuring"), warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # of labels that are random
        for name in names:
            model = untrained_encoder(name) if untrained else clouds.load(name, checkpoint, "cpu")
            measured: list[records.Row] = []
            for n_points in counts:
                if paths:
                    measured += path_rows(model, n_points, batch, repeats)
                elif not (large or frame):
                    measured += encoder_rows(model, n_points, batch, repeats)
                    measured += grouping_rows(model.grouping, n_points, batch, repeats)
            if frame:
                measured += frame_rows(model, repeats)
            rows += [{"encoder": name, **row} for row in measured] if len(names) > 1 else measured
        if large:
            rows += large_rows(large, repeats)
    config = {"encoder": names, "points": counts, "batch": batch, "repeats": repeats}
    config |= {"untrained": untrained, "large": large}
    record = records.new_record("bench points-speed", rows, seed=0, config=config)
    results.publish(record, COLUMNS.present_in({key: None for row in rows for key in row}))


def untrained_encoder(name: str) -> PointEncoder:
    """An encoder with random weights."""
    from budwood.points import ENCODERS

    return ENCODERS.get(name).make().eval().requires_grad_(False)
