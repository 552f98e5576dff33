"""The command line, one file a command."""

from __future__ import annotations

import logging

import typer

import budwood
from budwood.cli import bench, demo, ls, points, tune
from budwood.cli.classify import classify
from budwood.cli.errors import Commands
from budwood.cli.prune import prune

app = typer.Typer(
    name="budwood",
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("prune")(prune)
app.command("classify")(classify)
app.command("demo")(demo.demo)
app.add_typer(tune.app, name="tune")
app.add_typer(bench.app, name="bench")
app.add_typer(ls.app, name="ls")
app.add_typer(points.app, name="points")


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: bool = typer.Option(False, "--version")) -> None:
    """New abilities for frozen pretrained transformers.

    prune: a vision-language model answers from a tenth of its visual tokens, with no training.
    tune: a language model is fine-tuned and forgets little.
    classify, points: objects made of a few dozen points are named with words from a list.

    Bad input ends with one line on standard error and exit code 2.

    \b
    Examples:
      budwood demo
      budwood prune photo.jpg "What is on the table?" --keep 0.1 --overlay kept.png
      budwood classify chair.ply --labels chair,table,"desk lamp" --points 64
      budwood tune train.jsonl --output tuned
    """
    if version:
        typer.echo(f"budwood {budwood.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


# It says at its import, which PEFT sees to, what it lacks for 4-bit weights.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    """The entry point of the command line."""
    app(prog_name="budwood")
