"""`budwood points adapt`: an encoder adapted to sparse clouds of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood.cli import clouds, demo_points, options
from budwood.cli.console import out, print_json, progress

app = typer.Typer(rich_markup_mode=None)
app.command("demo")(demo_points.demo)


@app.callback(invoke_without_command=True)
def points(context: typer.Context) -> None:
    """Adapt point encoders to sparse clouds.

    \b
    Example:
      budwood points adapt scans/ --labels chair,table,lamp --output adapted/
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
    drop_invalid: clouds.DropInvalid = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
    json: options.Json = False,
) -> None:
    """Adapt an encoder with unlabelled dense clouds, so that a few of their points will do.

    The names say what could be there; which cloud is which stays unknown. The encoder is not
    changed: the adapter is a small file beside it, for `budwood classify --adapter`. Killed and
    started again with the same options, it goes on where it was.

    \b
    Example:
      budwood points adapt scans/ --labels-file names.txt --output adapted/
    """
    from budwood.points import AdaptConfig, Curriculum
    from budwood.points.adapt import check_output

    names = clouds.names_of(labels, labels_file, embeddings)
    config = AdaptConfig(
        method,
        steps,
        batch,
        lr,
        seed,
        curriculum=Curriculum(options.counts_of(counts, "counts")),
        sampler=sampler,
    )
    check_output(output, config)
    files = clouds.files_of(paths, labels_file)
    model, words = clouds.load(encoder, checkpoint, names, embeddings)
    given = []
    with progress("reading") as advance:  # raw clouds of a folder need not fit into memory
        for cloud in clouds.read_each(files, columns, drop_invalid, seed):
            given.append(model.prepare(cloud, up=up))
            advance(len(given), len(files))
    from budwood.points import adapt as run

    with progress("steps") as advance:
        adapter = run(given, words, model, config, output=output, on_step=advance)
    n_params = sum(p.numel() for p in adapter.parameters())
    if json:
        about = {"encoder": model.name, "method": method, "clouds": len(given), "params": n_params}
        print_json(about | {"steps": steps, "output": str(output)})
    else:
        out().print(
            f"adapted {model.name} by {method} to {len(given)} clouds: {n_params:,} parameters in "
            f"{output}",
            markup=False,
        )
