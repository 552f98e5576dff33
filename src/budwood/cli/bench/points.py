"""`budwood bench points`: what adaptation gains on classes that it never saw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood import records
from budwood.cli import clouds, options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import progress, working
from budwood.cli.results import Results

if TYPE_CHECKING:
    from budwood.bench.points import BenchConfig
    from budwood.points import PointEncoder

ALL = "frozen,tokens,adabn,tent,t3a,uni-adapter,point-cache,vpt-shallow,vpt-deep,lora,full"
ALL += ",esp-zero-paper,esp-zero,sparse-full,sparse-lora"

COLUMNS = Columns(
    Column("method"),
    Column("sees"),
    Column("sampler"),
    Column("points"),
    Column("unseen_top1", ".1%"),
    Column("unseen_std", ".1%"),
    Column("unseen_top5", ".1%"),
    Column("seen_top1", ".1%"),
    Column("seen_std", ".1%"),
    Column("seen_top5", ".1%"),
    Column("novel_top1", ".1%"),
    Column("params", ","),
    Column("lr", ".1g"),
    Column("seconds", ".0f"),
)


def bench_points(
    methods: options.Adaptations = ALL,
    points: Annotated[
        str, typer.Option(metavar="N,…", help="Numbers of points of random samples.")
    ] = "1024,256,128,64,32,16",
    lidar: Annotated[
        str,
        typer.Option(metavar="N,…", help="Numbers of points of LiDAR-like samples; '' for none."),
    ] = "64",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Clouds per step.")] = 32,
    sampler: Annotated[
        str, typer.Option(help="How points are chosen in adaptation: random, lidar, ….")
    ] = "random",
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose each learning rate on seen classes.")
    ] = False,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up", help="Methods that see other clouds first see those for adaptation."
        ),
    ] = False,
    encoder: clouds.Encoder = "sprout",
    checkpoint: clouds.Checkpoint = None,
    device: options.Device = "auto",
    out: options.Out = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against points.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure top-1 and top-5 of every method, by number of points, on the clouds that ship.

    Adaptation gets other clouds of the seen classes. The unseen classes occur only in the encoder's
    pretraining, and the novel classes in neither. Each cloud is classified among the labels of its
    group. Methods that see earlier clouds get the test clouds of a group one by one, in an order
    drawn by the seed, and start anew for each row and group. Means and standard deviations are over
    seeds. --out is written after each method. Repeat the command without --force to continue an
    interrupted run.

    \b
    Example:
      budwood bench points --methods tokens,adabn,sparse-lora --points 64 --seeds 1 --out new.json
    """
    from budwood.bench.points import BenchConfig

    results = Results(out, force, json, plot, resumes=True)
    sparse = options.counts_of(lidar, "lidar") if options.listed(lidar) else ()
    config = BenchConfig(
        tuple(options.listed(methods)),
        options.counts_of(points, "points"),
        sparse,
        seeds,
        steps,
        batch,
        sampler,
        tune=tune,
        warm_up=warm_up,
    )
    record = _measure(config, encoder, checkpoint, device, results)
    results.publish(record, COLUMNS, notes=[_legend(record.config)], draw=_draw)


def _measure(
    config: BenchConfig, encoder: str, checkpoint: Path | None, device: str, results: Results
) -> records.Record:
    from budwood.bench.points import run
    from budwood.points import load_clouds

    with working("reading clouds"):
        given = load_clouds()
    model = clouds.load(encoder, checkpoint, device)
    texts = clouds.embed(model, list(given.classes))
    about = _described(config, model, given)

    def record(rows: list[records.Row]) -> records.Record:
        return records.new_record("bench points", rows, seed=0, config=about)

    begun = results.begun(record([]), free="methods")
    methods = dict.fromkeys([*(row["method"] for row in begun), *config.methods])
    config = dataclasses.replace(config, methods=tuple(methods))
    about["methods"] = config.methods
    with progress("methods") as advance:
        rows = run(
            given,
            texts,
            model,
            config,
            advance,
            begun=begun,
            keep=lambda rows: results.keep(record(rows)),
        )
    return record(rows)


def _described(config: BenchConfig, encoder: PointEncoder, given: Any) -> dict[str, Any]:
    from budwood.points.adapters import fingerprint

    sizes: dict[str, Any] = {}
    for group in ("seen", "unseen", "novel"):
        part = given.where(group=group, use="test")
        sizes |= {f"n_{group}_clouds": len(part), f"n_{group}_classes": len(part.classes)}
    about = {"encoder": encoder.name, "encoder_digest": fingerprint(encoder)["digest"]}
    return {**about, **sizes, **dataclasses.asdict(config)}


def _draw(rows: list[records.Row], path: Path) -> None:
    from budwood.bench.plots import plot_lines

    curves = [
        row
        | {
            "low": row["unseen_top1"] - (row["unseen_std"] or 0),
            "high": row["unseen_top1"] + (row["unseen_std"] or 0),
        }
        for row in rows
        if row["sampler"] == "random"
    ]
    plot_lines(
        curves, path, x="points", y="unseen_top1", by="method", low="low", high="high", log=True
    )


def _legend(config: dict[str, Any]) -> str:
    groups = (
        f"{config[f'n_{group}_clouds']} clouds of {config[f'n_{group}_classes']} {group} classes"
        for group in ("seen", "unseen", "novel")
    )
    return f"{', '.join(groups)}; {config['seeds']} seeds; encoder {config['encoder']}"
