"""`budwood points`: adapt point encoders to sparse clouds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood import catalogue
from budwood.cli import clouds, demo_points, options
from budwood.cli.console import out, print_json, progress, say
from budwood.errors import InputError
from budwood.files import need_parent
from budwood.registry import Registry

app = typer.Typer(rich_markup_mode=None)
app.command("demo")(demo_points.demo)


@app.callback(invoke_without_command=True)
def points(context: typer.Context) -> None:
    """Adapt point encoders to sparse clouds.

    \b
    Examples:
      budwood points demo
      budwood points adapt scans/ --output adapted
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def adapt(
    paths: clouds.Clouds,
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder for the adapter; an unfinished run there is resumed."
        ),
    ],
    labels: clouds.Labels = None,
    labels_file: clouds.LabelsFile = None,
    embeddings: clouds.Embeddings = None,
    encoder: clouds.Encoder = "sprout",
    checkpoint: clouds.Checkpoint = None,
    method: Annotated[str, typer.Option(help="One of `budwood ls adaptations`.")] = "sparse-lora",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
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
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Adapt an encoder with unlabelled dense clouds, so that it recognises sparse ones.

    The encoder is not changed: the adapter is a small file beside it, for
    `budwood classify --adapter`. Some methods, such as esp-zero, also need labels of what may be
    there, but not which cloud is which. Clouds that cannot be read are listed and left out. An
    interrupted run is resumed by the same command.

    \b
    Examples:
      budwood points adapt scans/ --output adapted
      budwood points adapt scans/ --output adapted --method esp-zero --labels-file labels.txt
    """
    from budwood.points import InputOptions

    Registry("method", catalogue.ADAPTATIONS).check(method)
    reading = clouds.reading_of(columns, box, drop_invalid, up)
    InputOptions(sampler=sampler, **reading)
    need_parent(output)
    files = clouds.files_of(paths, labels_file)

    # These import torch, which takes seconds.
    from budwood.points import AdaptConfig, Curriculum
    from budwood.points import adapt as adapt_encoder
    from budwood.points.adaptation import check_output

    curriculum = Curriculum(options.counts_of(counts, "counts"))
    config = AdaptConfig(method, steps, batch, lr, seed, curriculum=curriculum, sampler=sampler)
    needs_labels = config.resolved.compares_labels
    given = clouds.labels_of(labels, labels_file, embeddings) if needs_labels else None
    check_output(output, config)
    model = clouds.load(encoder, checkpoint, device)
    texts = clouds.embed(model, given, embeddings) if needs_labels else None
    skipped = clouds.Skipped()
    try:
        with progress("steps") as advance:
            adapter = adapt_encoder(
                files,
                texts,
                model,
                config,
                output=output,
                on_error=skipped,
                progress=advance,
                **reading,
            )
    except InputError:
        if len(skipped) == len(files):
            raise InputError(skipped.rows[0]["reason"]) from None
        raise
    for row in skipped.rows:
        say(f"left out: {row['reason']}")
    n_clouds = len(files) - len(skipped)
    n_params = sum(p.numel() for p in adapter.parameters())
    if json:
        about = {"encoder": model.name, "method": method, "clouds": n_clouds, "params": n_params}
        print_json(about | {"steps": steps, "output": str(output), "skipped": skipped.rows})
    else:
        out().print(
            f"adapted {model.name} by {method} to {n_clouds} clouds: {n_params:,} parameters in "
            f"{output}",
            markup=False,
        )
