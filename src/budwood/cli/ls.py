"""`budwood ls`: the names that commands take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from budwood import catalogue
from budwood.cli import options
from budwood.cli.columns import Column
from budwood.cli.commands import App
from budwood.cli.console import print_json, print_table, print_text
from budwood.registry import Entry

app = App()


@app.callback(invoke_without_command=True)
def ls(context: typer.Context) -> None:
    """List methods, models and encoders.

    \b
    Example:
      budwood ls methods
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def methods(json: options.Json = False) -> None:
    """Pruning methods: the signals that they read, whether they merge tokens, and their source.

    \b
    Example:
      budwood ls methods --json
    """
    _show("methods", catalogue.PRUNING_METHODS, ("reads", "merges", "description", "source"), json)


@app.command()
def families(json: options.Json = False) -> None:
    """Model families that can be pruned, by names like the model_type in their configuration.

    \b
    Example:
      budwood ls families
    """
    _show("families", catalogue.FAMILIES, ("description", "source"), json)


@app.command()
def tuners(json: options.Json = False) -> None:
    """Tuning methods, for `budwood tune --method` and `budwood bench tune`.

    \b
    Example:
      budwood ls tuners
    """
    _show("tuners", catalogue.TUNERS, ("kind", "description"), json)


@app.command()
def models(json: options.Json = False) -> None:
    """Vision-language models to start with; any checkpoint of a known family works.

    \b
    Example:
      budwood ls models
    """
    _show("models", catalogue.MODELS, ("family", "description", "source"), json)


@app.command()
def encoders(json: options.Json = False) -> None:
    """Point encoders, what they were trained on, their text towers and where their weights are.

    \b
    Example:
      budwood ls encoders
    """
    _show(
        "encoders", catalogue.ENCODERS, ("description", "text", "weights", "file", "licence"), json
    )


@app.command()
def labels(json: options.Json = False) -> None:
    """Labels that the embedded encoder was trained on, by part (indoor, road).

    Other labels work better the more they resemble one of these.

    \b
    Example:
      budwood ls labels
    """
    from budwood.points.label_file import SPROUT_LABELS, names_in

    parts = names_in(SPROUT_LABELS)
    if json:
        print_json(
            {"labels": [{"name": n, "part": p} for p, names in parts.items() for n in names]}
        )
        return
    for part, names in parts.items():
        print_text(f"{part} ({len(names)}): {', '.join(names)}")


@app.command()
def adaptations(json: options.Json = False) -> None:
    """Ways to adapt a point encoder to sparse clouds, what each label depends on, and their source.

    Most see one cloud at a time. Some also see the earlier clouds of a call, or all of them.

    \b
    Example:
      budwood ls adaptations
    """
    _show("adaptations", catalogue.ADAPTATIONS, ("sees", "description", "source"), json)


def _show(title: str, entries: Mapping[str, Entry], columns: tuple[str, ...], json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for name, entry in entries.items():
        texts = {**entry.facts, "description": entry.summary, "source": entry.source}
        rows.append({"name": name, **{column: texts[column] for column in columns}})
    if json:
        print_json({title: rows})
    else:
        print_table(rows, [Column(key) for key in rows[0]])
