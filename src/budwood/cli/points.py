"""`budwood points`: adapt point encoders to sparse clouds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from budwood.cli import clouds, demo_points, options
from budwood.cli.assumed import json_of, say_assumed
from budwood.cli.commands import App
from budwood.cli.console import out, print_json, progress, say, working
from budwood.cli.models import be_quiet
from budwood.cli.output import reserve
from budwood.errors import InputError, InputWarning
from budwood.files import need_parent

if TYPE_CHECKING:
    from budwood.points import AdaptConfig
    from budwood.points.adapters.base import Adapter, Usage

app = App()
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
    text: clouds.Text = None,
    templates: clouds.Templates = "points64",
    encoder: clouds.Encoder = "sprout",
    checkpoint: clouds.Checkpoint = None,
    method: options.Adaptation = "sparse-lora",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Clouds per step.")] = 32,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the method's.")] = None,
    counts: Annotated[
        str, typer.Option(metavar="N,…", help="Numbers of points to adapt to.")
    ] = "1024,256,128,64,32",
    sampler: clouds.Sampler = "random",
    up: clouds.Up = "auto",
    columns: clouds.Columns = None,
    box: clouds.Box = None,
    drop_invalid: clouds.DropInvalid = False,
    keep_strays: clouds.KeepStrays = False,
    remove_ground: clouds.RemoveGround = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Adapt an encoder with unlabelled dense clouds, so that it recognises sparse ones.

    The encoder does not change. The adapter is a small file for `budwood classify --adapter`. Some
    methods, such as esp-zero, also need labels of what the clouds could be, but not which cloud is
    which. Clouds that cannot be read are listed and left out. Repeat the command to continue an
    interrupted run.

    \b
    Examples:
      budwood points adapt scans/ --output adapted
      budwood points adapt scans/ --output adapted --method esp-zero --labels-file labels.txt
    """
    from budwood.points import InputOptions

    reading = clouds.reading_of(columns, box, drop_invalid, up, keep_strays, remove_ground)
    InputOptions(sampler=sampler, **reading)
    need_parent(output)
    files = clouds.files_of(paths, labels_file)

    # These import torch, which takes seconds.
    from budwood.points import AdaptConfig, Curriculum, read_embeddings
    from budwood.points import adapt as adapt_encoder
    from budwood.points.adaptation import check_output

    curriculum = Curriculum(options.counts_of(counts, "counts"))
    config = AdaptConfig(method, steps, batch, lr, seed, curriculum=curriculum, sampler=sampler)
    check_output(output, config)
    texts = None
    if config.resolved.compares_labels:
        texts = clouds.labels_of(labels, labels_file, embeddings)
        if embeddings is not None:
            texts = read_embeddings(embeddings)
    elif (labels, labels_file, embeddings) != (None, None, None):
        say(f"method {method!r} compares no labels; those given are not used")
    skipped = clouds.Skipped()
    be_quiet()
    try:
        with progress("steps") as advance, warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)  # said below
            adapter = adapt_encoder(
                files,
                texts,
                encoder,
                config,
                checkpoint=checkpoint,
                device=device,
                output=output,
                text=text,
                templates=templates,
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
    assert adapter.usage is not None  # adapt() sets it
    say_assumed(adapter.usage.assumed, reading)
    _print_adapted(adapter, adapter.usage, config, output, skipped if json else None)


def _print_adapted(
    adapter: Adapter,
    usage: Usage,
    config: AdaptConfig,
    output: Path,
    skipped: clouds.Skipped | None,
) -> None:
    """Say what was adapted to how many clouds; as JSON, where ``skipped`` is given."""
    if usage.n_used < usage.n_clouds:
        counts = ", ".join(f"{n:,} points: {n_clouds}" for n, n_clouds in usage.by_count.items())
        say(f"clouds with enough points for steps on {counts}")
    name, method = adapter.encoder.name, config.method
    n_params = sum(p.numel() for p in adapter.parameters())
    if skipped is not None:
        about = {"encoder": name, "method": method, "clouds": usage.n_used}
        about |= {"given": usage.n_clouds, "clouds_by_points": usage.by_count, "params": n_params}
        about |= {"assumed": {cloud: json_of(one) for cloud, one in usage.assumed.items()}}
        print_json(about | {"steps": config.steps, "output": str(output), "skipped": skipped.rows})
    else:
        of = "" if usage.n_used == usage.n_clouds else f" of {usage.n_clouds}"
        out().print(
            f"adapted {name} by {method} to {usage.n_used}{of} clouds: {n_params:,} parameters in "
            f"{output}",
            markup=False,
        )


@app.command()
def embed(
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Where the embeddings go: a .safetensors file."),
    ],
    labels: clouds.Labels = None,
    labels_file: clouds.LabelsFile = None,
    text: clouds.Text = None,
    templates: clouds.Templates = "points64",
    synonyms: clouds.Synonyms = True,
    encoder: clouds.Encoder = "ulip2",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write text embeddings for an encoder, for machines that have no text model.

    Without labels, common labels of roads and rooms are embedded. This needs the encoder's text
    model, from the hub, but not the encoder's weights. (ULIP's text model is in its checkpoint:
    give that as --text.) `budwood classify --embeddings FILE --labels car,bus` chooses among them.

    \b
    Examples:
      budwood points embed --encoder openshape --output openshape-labels.safetensors
      budwood points embed --encoder ulip2 --labels-file labels.txt --output ulip2.safetensors
    """
    from budwood.points.vocabulary import COMMON_LABELS

    if output.suffix != ".safetensors":
        raise InputError(f"{output} must end in .safetensors")
    reserve(output, force, [labels_file, text])
    chosen = list(dict.fromkeys(label for part in COMMON_LABELS.values() for label in part))
    if labels is not None or labels_file is not None:
        chosen = clouds.labels_of(labels, labels_file, ways="--labels and --labels-file") or []

    # These import torch, which takes seconds.
    from budwood.points import save_embeddings
    from budwood.points.text import embed_labels_without_encoder

    be_quiet()
    with working("embedding the labels"):
        texts = embed_labels_without_encoder(
            encoder, chosen, text=text, templates=templates, synonyms=synonyms
        )
    save_embeddings(texts, output, overwrite=force)
    if json:
        about = {"encoder": encoder, "labels": list(texts.labels), "output": str(output)}
        print_json(about | {"width": texts.vectors.shape[1]})
    else:
        out().print(f"wrote {len(texts)} labels for {encoder} to {output}", markup=False)
