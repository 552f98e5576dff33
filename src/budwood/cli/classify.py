"""`budwood classify`: names for point clouds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import clouds, options
from budwood.cli.console import print_json, print_table, progress, say
from budwood.cli.output import reserve, reserve_picture
from budwood.errors import InputError
from budwood.figures import need_matplotlib
from budwood.files import write_whole

if TYPE_CHECKING:
    from budwood.points import PointEncoder, Ranking

BATCH = 32


def classify(
    paths: clouds.Clouds,
    labels: clouds.Labels = None,
    labels_file: clouds.LabelsFile = None,
    embeddings: clouds.Embeddings = None,
    points: Annotated[
        int | None,
        typer.Option(
            min=2, help="Points to keep of each; default: those of the encoder's training."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What `budwood points adapt` wrote.")
    ] = None,
    encoder: clouds.Encoder = "sprout",
    checkpoint: clouds.Checkpoint = None,
    sampler: clouds.Sampler = "random",
    up: clouds.Up = "y",
    columns: clouds.Columns = None,
    box: clouds.Box = None,
    drop_invalid: clouds.DropInvalid = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Names shown of each cloud.")] = 5,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the cloud (one only).")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the names as CSV.")
    ] = None,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Name the objects in point clouds, with words from a list.

    Meshes are sampled. Scores are probabilities over the words given. Of several clouds, those that
    cannot be read are named at the end, after the names of the others, and the exit code is 2.

    \b
    Examples:
      budwood classify chair.ply --labels chair,table,"desk lamp" --points 64 --plot chair.png
      budwood classify scans/ --labels-file names.txt --adapter adapted/ --csv names.csv
    """
    from budwood.points import SAMPLERS

    names = clouds.names_of(labels, labels_file, embeddings)
    SAMPLERS.get(sampler)
    reading = clouds.Reading(columns, drop_invalid, up, seed, box)
    files = clouds.files_of(paths, labels_file, table)
    if plot:
        if len(files) > 1:
            raise InputError(f"--plot draws one cloud, and there are {len(files)}")
        if table and table.resolve() == plot.resolve():
            raise InputError(f"--csv and --plot are both {plot}; give two names")
        reserve_picture(plot, force)
        need_matplotlib()
    if table:
        reserve(table, force)
    model = clouds.load(encoder, checkpoint, device)
    words = clouds.words_of(model, names, embeddings)
    how = {"points": points, "sampler": sampler}
    rankings, skipped = _rank(files, model, words, adapter, reading, top, **how)
    if table:
        write_whole(table, lambda part: _write_csv(rankings, part))
        say(f"wrote {table}")
    if plot:
        write_whole(plot, lambda part: _draw(files[0], rankings[0], model, reading, how, part))
        say(f"wrote {plot}")
    if json:
        named = str(adapter) if adapter else None
        about = {"encoder": model.name, "adapter": named, **how, "up": up, "seed": seed, "top": top}
        print_json({**about, "rows": _rows(rankings), "skipped": skipped})
    else:
        _print(rankings)
    if skipped:
        for one in skipped:
            say(f"skipped: {one['reason']}")
        raise InputError(f"{len(skipped)} of {len(files)} clouds have no name; see above")


def _rank(
    files: list[Path],
    model: PointEncoder,
    words: Any,
    adapter: Path | None,
    reading: clouds.Reading,
    top: int,
    **how: Any,
) -> tuple[list[Ranking], list[dict[str, str]]]:
    """Rankings, and the clouds that have none, with the reason.

    Raises:
        InputError: no cloud can be named.
    """
    from budwood.points import load_adapter
    from budwood.points.classify import rank

    adapted = None if adapter is None else load_adapter(adapter, model)
    found: list[Ranking] = []
    skipped: list[dict[str, str]] = []
    with progress("clouds") as advance:
        together = len(files) if adapted is not None and adapted.transductive else BATCH
        for part in clouds.chunks(files, together):
            prepared = list(reading.prepare_each(model, part, skipped, **how))
            found += rank(prepared, words, model, adapted, top=top)
            advance(len(found) + len(skipped), len(files))
    if not found:
        raise InputError(skipped[0]["reason"])
    return found, skipped


def _rows(rankings: list[Ranking]) -> list[dict[str, Any]]:
    return [
        {
            "cloud": one.source,
            "n_points": one.n_points,
            "names": list(one.names),
            "scores": [round(score, 6) for score in one.scores],
        }
        for one in rankings
    ]


def _write_csv(rankings: list[Ranking], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cloud", "n_points", "rank", "name", "score"])
        for one in rankings:
            for rank, (name, score) in enumerate(zip(one.names, one.scores), 1):
                writer.writerow([one.source, one.n_points, rank, name, f"{score:.6f}"])


def _print(rankings: list[Ranking]) -> None:
    rows = [
        {
            "cloud": one.source,
            "points": one.n_points,
            "name": one.best,
            "score": one.scores[0],
            "then": ", ".join(f"{n} {s:.0%}" for n, s in zip(one.names[1:], one.scores[1:])),
        }
        for one in rankings
    ]
    specs = {"cloud": "", "points": "", "name": "", "score": ".1%", "then": ""}
    print_table(rows, {key: (key, spec) for key, spec in specs.items()})


def _draw(
    file: Path,
    ranking: Ranking,
    model: PointEncoder,
    reading: clouds.Reading,
    how: dict[str, Any],
    path: Path,
) -> None:
    from budwood.points.picture import draw

    dense, _ = reading.prepare(model, file)
    sparse, _ = reading.prepare(model, file, **how)
    told = f"{len(sparse)} points: {ranking.best} {ranking.scores[0]:.0%}"
    views = [(told, sparse.numpy())]
    if len(sparse) < len(dense):
        views.insert(0, (f"{len(dense)} points", dense.numpy()))
    draw(views, path)
