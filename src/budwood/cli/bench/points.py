"""`budwood bench points`: what adaptation gains on classes that it never saw."""

from __future__ import annotations

import dataclasses
import itertools
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
    from budwood.points import CloudSet, PointEncoder

ALL = "frozen,tokens,adabn,tent,t3a,uni-adapter,point-cache,vpt-shallow,vpt-deep,lora,full"
ALL += ",esp-zero-paper,esp-zero,sparse-full,sparse-lora"

COLUMNS = Columns(
    Column("method"),
    Column("sees"),
    Column("sampler"),
    Column("points"),
    Column("part"),
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
        str,
        typer.Option(metavar="N,…", help="Numbers of points of random samples; '' for none."),
    ] = "1024,256,128,64,32,16",
    lidar: Annotated[
        str,
        typer.Option(metavar="N,…", help="Numbers of points of LiDAR-like samples; '' for none."),
    ] = "64",
    occluded: Annotated[
        str,
        typer.Option(metavar="N,…", help="Numbers of points of samples from one side."),
    ] = "",
    part: options.Part = "indoor",
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

    Adaptation gets other clouds of the seen classes of the same part. The unseen classes occur only
    in the encoder's pretraining, and the novel classes in neither. Each cloud is classified among
    the labels of its group. Methods that see earlier clouds get the test clouds of a group one by
    one, in an order drawn by the seed, and start anew for each row and group. Means and standard
    deviations are over seeds. --out is written after each method. Repeat the command without
    --force to continue an interrupted run.

    \b
    Examples:
      budwood bench points --methods tokens,adabn,sparse-lora --points 64 --seeds 1 --out new.json
      budwood bench points --part road --points '' --lidar 128,64 --sampler lidar --methods tokens
    """
    from budwood.bench.points import BenchConfig
    from budwood.points.data import load_clouds, parts_of

    results = Results(out, force, json, plot, resumes=True)
    config = BenchConfig(
        tuple(options.listed(methods)),
        _counts(points, "points"),
        _counts(lidar, "lidar"),
        seeds,
        steps,
        batch,
        sampler,
        tune=tune,
        warm_up=warm_up,
        occluded=_counts(occluded, "occluded"),
    )
    with working("reading clouds"):
        given = {one: load_clouds(part=one) for one in parts_of(part)}
    model = clouds.load(encoder, checkpoint, device)
    about = {"part": part, **_described(config, model, given)}
    record = _measure(config, model, given, about, results)
    notes = [_legend(record.config, one, len(given) > 1) for one in given]
    results.publish(record, COLUMNS, notes=notes, draw=_draw)


def _counts(text: str, name: str) -> tuple[int, ...]:
    return options.counts_of(text, name) if options.listed(text) else ()


def _measure(
    config: BenchConfig,
    model: PointEncoder,
    given: dict[str, CloudSet],
    about: dict[str, Any],
    results: Results,
) -> records.Record:
    """Measure all methods on one part after the other."""
    from budwood.bench.points import run

    def record(rows: list[records.Row]) -> records.Record:
        return records.new_record("bench points", rows, seed=0, config=about)

    begun = results.begun(record([]), free="methods")
    methods = dict.fromkeys([*(row["method"] for row in begun), *config.methods])
    config = dataclasses.replace(config, methods=tuple(methods))
    about["methods"] = config.methods
    rows = {part: [row for row in begun if row["part"] == part] for part in given}

    def measure(part: str) -> None:
        before = rows[part]

        def keep(found: list[records.Row]) -> None:
            rows[part] = [{**row, "part": part} for row in found]
            results.keep(record([*itertools.chain(*rows.values())]))

        texts = clouds.embed(model, list(given[part].classes))
        with progress(f"methods, {part} clouds") as advance:
            run(given[part], texts, model, config, advance, begun=before, keep=keep)

    for part in given:
        measure(part)
    return record([*itertools.chain(*rows.values())])


def _described(
    config: BenchConfig, encoder: PointEncoder, given: dict[str, CloudSet]
) -> dict[str, Any]:
    from budwood.points.adapters import fingerprint
    from budwood.points.data import GROUPS

    sizes: dict[str, Any] = {}
    for (part, all_clouds), group in itertools.product(given.items(), GROUPS):
        tested, key = all_clouds.where(group=group, use="test"), _key(part, group, len(given) > 1)
        sizes |= {f"{key}_clouds": len(tested), f"{key}_classes": len(tested.classes)}
    about = {"encoder": encoder.name, "encoder_digest": fingerprint(encoder)["digest"]}
    return {**about, **sizes, **dataclasses.asdict(config)}


def _draw(rows: list[records.Row], path: Path) -> None:
    from budwood.bench.plots import plot_lines

    several = len({row["part"] for row in rows}) > 1
    curves = [
        row
        | {
            "low": row["unseen_top1"] - (row["unseen_std"] or 0),
            "high": row["unseen_top1"] + (row["unseen_std"] or 0),
            "curve": f"{row['method']} ({row['part']})" if several else row["method"],
        }
        for row in rows
        if row["sampler"] == rows[0]["sampler"]
    ]
    plot_lines(
        curves, path, x="points", y="unseen_top1", by="curve", low="low", high="high", log=True
    )


def _key(part: str, group: str, several: bool) -> str:
    """How keys of the config begin that are about a group."""
    return f"n_{part}_{group}" if several else f"n_{group}"


def _legend(config: dict[str, Any], part: str, several: bool) -> str:
    keys = {group: _key(part, group, several) for group in ("seen", "unseen", "novel")}
    groups = (
        f"{config[f'{key}_clouds']} clouds of {config[f'{key}_classes']} {group} classes"
        for group, key in keys.items()
        if config[f"{key}_clouds"]
    )
    return f"{part}: {', '.join(groups)}; {config['seeds']} seeds; encoder {config['encoder']}"
