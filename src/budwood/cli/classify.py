"""`budwood classify`: labels for point clouds."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import clouds, options
from budwood.cli.assumed import json_of, say_assumed
from budwood.cli.columns import Column, Columns
from budwood.cli.console import print_json, print_table, progress, say
from budwood.cli.output import reserve, reserve_picture
from budwood.errors import InputError, InputWarning
from budwood.figures import need_matplotlib
from budwood.files import write_whole

if TYPE_CHECKING:
    from budwood.points import InputOptions, PointEncoder, Ranking

COLUMNS = Columns(
    Column("cloud"),
    Column("points"),
    Column("label"),
    Column("score", ".1%"),
    Column("then"),
)


def classify(
    paths: clouds.Clouds,
    labels: clouds.Labels = None,
    labels_file: clouds.LabelsFile = None,
    embeddings: clouds.Embeddings = None,
    text: clouds.Text = None,
    templates: clouds.Templates = "points64",
    synonyms: clouds.Synonyms = True,
    points: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Points to keep of each cloud; by default the most that the encoder was made for.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="An adapter for sparse clouds, by `budwood points adapt`."
        ),
    ] = None,
    encoder: clouds.EncoderOrAdapters = None,
    checkpoint: clouds.Checkpoint = None,
    sampler: clouds.Sampler = "random",
    up: clouds.Up = "auto",
    columns: clouds.Columns = None,
    box: clouds.Box = None,
    drop_invalid: clouds.DropInvalid = False,
    keep_strays: clouds.KeepStrays = False,
    remove_ground: clouds.RemoveGround = False,
    seed: options.Seed = 0,
    top: Annotated[int, typer.Option(min=1, help="Labels to show for each cloud.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Clouds at once.")] = 32,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the cloud (of a single file).")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write labels and scores as CSV.")
    ] = None,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Classify point clouds with labels in words.

    Scores are probabilities over the labels given. A line on standard error says what was assumed
    about the files (columns, the axis that points up, units) and which points were left out. Clouds
    that cannot be read are listed at the end, after the labels of the others, and the exit code
    is 2.

    \b
    Examples:
      budwood classify chair.ply --labels chair,table,"desk lamp" --points 64 --plot chair.png
      budwood classify scans/ --labels-file labels.txt --adapter adapted/ --csv found.csv
    """
    from budwood.points import InputOptions

    given = clouds.labels_of(labels, labels_file, embeddings)
    how = {"points": points, "sampler": sampler, "seed": seed}
    reading = clouds.reading_of(columns, box, drop_invalid, up, keep_strays, remove_ground)
    how |= reading
    inputs = InputOptions(**how)
    files = clouds.files_of(paths, labels_file, table)
    reads = [*files, labels_file, embeddings, checkpoint, adapter, text]
    _reserve(files, table, plot, force, reads)

    # These import torch, which takes seconds.
    from budwood.points import classify as classify_clouds
    from budwood.points.text import refuse_phrasing

    if embeddings:
        refuse_phrasing(templates, synonyms)
    model = clouds.load(encoder, checkpoint, device, adapter)
    texts = clouds.embed(model, given, embeddings, text, templates, synonyms)
    strange = clouds.say_unfamiliar(model, texts, text)
    skipped = clouds.Skipped()
    rankings: list[Ranking] = []
    with progress("clouds") as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # say_assumed and say_unfamiliar say it
        found = classify_clouds(
            iter(files),
            texts,
            encoder=model,
            adapter=adapter,
            top=top,
            batch_size=batch,
            on_error=skipped,
            **how,
        )
        for ranking in found:
            rankings.append(ranking)
            advance(len(rankings) + len(skipped), len(files))
    if not rankings:
        raise InputError(skipped.rows[0]["reason"])
    say_assumed({one.source: one.assumed for one in rankings if one.assumed}, reading)
    if table:
        write_whole(table, lambda part: _write_csv(rankings, part))
        say(f"wrote {table}")
    if plot:
        write_whole(plot, lambda part: _draw(files[0], rankings[0], model, inputs, part))
        say(f"wrote {plot}")
    if json:
        about = {"encoder": model.name, "adapter": str(adapter) if adapter else None}
        about |= {"points": points, "sampler": sampler, "up": up, "seed": seed, "top": top}
        about |= {"unfamiliar": strange}
        print_json({**about, "rows": _rows(rankings), "skipped": skipped.rows})
    else:
        _print(rankings)
    skipped.refuse(len(files), "clouds have no label")


def _reserve(
    files: list[Path],
    table: Path | None,
    plot: Path | None,
    force: bool,
    reads: list[Path | str | None],
) -> None:
    """Check that the outputs can be written, before slow work."""
    if plot:
        if len(files) > 1:
            raise InputError(f"--plot draws one cloud, and there are {len(files)}")
        if table and table.resolve() == plot.resolve():
            raise InputError(f"--csv and --plot are both {plot}; give two names")
        reserve_picture(plot, force, reads)
        need_matplotlib()
    if table:
        reserve(table, force, reads)


def _rows(rankings: list[Ranking]) -> list[dict[str, Any]]:
    return [
        {
            "cloud": ranking.source,
            "n_points": ranking.n_points,
            "names": list(ranking.labels),
            "scores": [round(score, 6) for score in ranking.scores],
            "assumed": json_of(ranking.assumed),
        }
        for ranking in rankings
    ]


def _write_csv(rankings: list[Ranking], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cloud", "n_points", "rank", "name", "score"])
        for ranking in rankings:
            for rank, (label, score) in enumerate(zip(ranking.labels, ranking.scores), 1):
                writer.writerow([ranking.source, ranking.n_points, rank, label, f"{score:.6f}"])


def _print(rankings: list[Ranking]) -> None:
    rows = []
    for ranking in rankings:
        others = zip(ranking.labels[1:], ranking.scores[1:])
        rows.append(
            {
                "cloud": ranking.source,
                "points": ranking.n_points,
                "label": ranking.best,
                "score": ranking.scores[0],
                "then": ", ".join(f"{label} {score:.0%}" for label, score in others),
            }
        )
    print_table(rows, COLUMNS)


def _draw(
    file: Path, ranking: Ranking, encoder: PointEncoder, inputs: InputOptions, path: Path
) -> None:
    """Draw the points that were classified, beside the dense cloud if that has more."""
    from budwood.points.picture import draw

    cloud = inputs.read(file)
    dense, _ = encoder.prepare(cloud, up=inputs.up, seed=inputs.seed)
    sparse, _ = inputs.prepare(cloud, encoder)
    views = [(f"{len(sparse)} points: {ranking.best} {ranking.scores[0]:.0%}", sparse.numpy())]
    if len(sparse) < len(dense):
        views.insert(0, (f"{len(dense)} points", dense.numpy()))
    draw(views, path)
