"""`budwood points adapt`: an encoder adapted to sparse clouds of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import clouds, demo_points, options
from budwood.cli.console import out, print_json, progress, say
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.points import PointEncoder

app = typer.Typer(rich_markup_mode=None)
app.command("demo")(demo_points.demo)


@app.callback(invoke_without_command=True)
def points(context: typer.Context) -> None:
    """Adapt point encoders to sparse clouds.

    \b
    Example:
      budwood points adapt scans/ --output adapted/
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def adapt(
    paths: clouds.Clouds,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the adapter goes; an unfinished run goes on.")
    ],
    labels: clouds.Labels = None,
    labels_file: clouds.LabelsFile = None,
    embeddings: clouds.Embeddings = None,
    encoder: clouds.Encoder = "sprout",
    checkpoint: clouds.Checkpoint = None,
    method: Annotated[str, typer.Option(help="One of `budwood ls adaptations`.")] = "sparse-lora",
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Clouds a step.")] = 32,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the method's.")] = None,
    counts: Annotated[
        str, typer.Option(metavar="N,…", help="Numbers of points to adapt to.")
    ] = "1024,256,128,64,32",
    sampler: clouds.Sampler = "random",
    up: clouds.Up = "y",
    columns: clouds.Columns = None,
    box: clouds.Box = None,
    drop_invalid: clouds.DropInvalid = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Adapt an encoder with unlabelled dense clouds, so that a few of their points will do.

    Some methods, such as esp-zero, compare names, which say what could be there; which cloud is
    which stays unknown. The encoder is not changed: the adapter is a small file beside it, for
    `budwood classify --adapter`. Clouds that cannot be read are named and left out. Killed and
    started again with the same options, it goes on where it was.

    \b
    Example:
      budwood points adapt scans/ --output adapted/
      budwood points adapt scans/ --output adapted/ --method esp-zero --labels-file names.txt
    """
    from budwood.points import AdaptConfig, Curriculum
    from budwood.points import adapt as run
    from budwood.points.adapt import check_output

    config = AdaptConfig(
        method,
        steps,
        batch,
        lr,
        seed,
        curriculum=Curriculum(options.counts_of(counts, "counts")),
        sampler=sampler,
    )
    needed = config.resolved.compares_names
    names = clouds.names_of(labels, labels_file, embeddings) if needed else None
    reading = clouds.Reading(columns, drop_invalid, up, seed, box)
    check_output(output, config)
    files = clouds.files_of(paths, labels_file)
    model = clouds.load(encoder, checkpoint, device)
    words = clouds.words_of(model, names, embeddings) if needed else None
    given, skipped = _read(files, model, reading)
    with progress("steps") as advance:
        adapter = run(given, words, model, config, output=output, on_step=advance)
    n_params = sum(p.numel() for p in adapter.parameters())
    if json:
        about = {"encoder": model.name, "method": method, "clouds": len(given), "params": n_params}
        print_json(about | {"steps": steps, "output": str(output), "skipped": skipped})
    else:
        out().print(
            f"adapted {model.name} by {method} to {len(given)} clouds: {n_params:,} parameters in "
            f"{output}",
            markup=False,
        )


def _read(
    files: list[Path], model: PointEncoder, reading: clouds.Reading
) -> tuple[list[Any], list[dict[str, str]]]:
    """The clouds, prepared, and those that cannot be used, with the reason.

    Raises:
        InputError: no cloud can be used.
    """
    given: list[Any] = []
    skipped: list[dict[str, str]] = []
    with progress("reading") as advance:  # one by one: raw clouds need not fit into memory
        for _, cloud in reading.prepare_each(model, files, skipped):
            given.append(cloud)
            advance(len(given) + len(skipped), len(files))
    if not given:
        raise InputError(skipped[0]["reason"])
    for one in skipped:
        say(f"left out: {one['reason']}")
    return given, skipped
