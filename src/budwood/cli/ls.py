"""`budwood ls`: what there is."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from budwood.cli import options
from budwood.cli.console import print_json, print_table

app = typer.Typer(rich_markup_mode=None)

MODELS = (
    ("sprout", "llava", "embedded default: a small LLaVA around SmolLM2-135M", "this package"),
    ("llava-hf/llava-1.5-7b-hf", "llava", "LLaVA-1.5, 576 visual tokens", "the hub"),
    ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next", "LLaVA-NeXT, up to 2,880", "the hub"),
    ("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", "Qwen2.5-VL, any number", "the hub"),
)
"""Examples; any checkpoint of a known family will do."""


@app.callback(invoke_without_command=True)
def ls(context: typer.Context) -> None:
    """List methods, model families and models.

    \b
    Example:
      budwood ls methods
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def methods(json: options.Json = False) -> None:
    """Pruning methods, what they read and where they come from.

    \b
    Example:
      budwood ls methods --json
    """
    from budwood.prune.methods import METHODS

    rows = []
    for name in METHODS:
        method = METHODS.get(name)
        needs = {"text": method.needs_text, "saliency": method.needs_saliency}
        reads = " and ".join(signal for signal, needed in needs.items() if needed)
        row = {"name": name, "reads": reads or "nothing"}
        rows.append(row | {"description": _summary(method), "source": method.source})
    _show("methods", rows, json)


@app.command()
def families(json: options.Json = False) -> None:
    """Model families, by the model_type in their configuration.

    \b
    Example:
      budwood ls families
    """
    from budwood.prune.families import FAMILIES

    found = {name: FAMILIES.get(name) for name in FAMILIES}
    rows = [
        {"name": name, "description": _summary(family), "source": family.__module__}
        for name, family in found.items()
    ]
    _show("families", rows, json)


@app.command()
def tuners(json: options.Json = False) -> None:
    """Ways of fine-tuning, for `budwood tune --method` and `budwood bench tune`.

    \b
    Example:
      budwood ls tuners
    """
    from budwood.tune.methods import TUNERS

    rows = []
    for name in TUNERS:
        tuner = TUNERS.get(name)
        role = "ablation" if tuner.is_ablation else "method"
        rows.append({"name": name, "kind": role, "description": _summary(tuner)})
    _show("tuners", rows, json)


@app.command()
def models(json: options.Json = False) -> None:
    """Models to begin with; any checkpoint of a known family works.

    \b
    Example:
      budwood ls models
    """
    keys = ("name", "family", "description", "source")
    _show("models", [dict(zip(keys, model)) for model in MODELS], json)


@app.command()
def encoders(json: options.Json = False) -> None:
    """Point encoders, their text towers and where their weights are.

    \b
    Example:
      budwood ls encoders
    """
    import torch

    from budwood.points import ENCODERS

    found = {name: ENCODERS.get(name) for name in ENCODERS}
    with torch.device("meta"):
        texts = {name: spec.make().text for name, spec in found.items()}
    rows = [
        {
            "name": name,
            "text": texts[name],
            "weights": spec.hub.repo if spec.hub else "this package",
            "file": spec.hub.file if spec.hub else "sprout.safetensors",
            "licence": spec.hub.licence if spec.hub else "Apache-2.0",
        }
        for name, spec in found.items()
    ]
    _show("encoders", rows, json)


@app.command()
def adaptations(json: options.Json = False) -> None:
    """Ways to adapt a point encoder to sparse clouds, and where they come from.

    \b
    Example:
      budwood ls adaptations
    """
    from budwood.points import METHODS

    found = {name: METHODS.get(name) for name in METHODS}
    rows = [
        {"name": name, "description": method.summary, "source": method.source}
        for name, method in found.items()
    ]
    _show("adaptations", rows, json)


def _show(title: str, rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        print_json({title: rows})
    else:
        print_table(rows, {key: (key, "") for key in rows[0]})


def _summary(thing: type) -> str:
    """The first line of what it says about itself."""
    return (inspect.getdoc(thing) or "").partition("\n")[0].replace("``", "")
