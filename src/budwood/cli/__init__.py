"""The command line, one file per command."""

from __future__ import annotations

import gc
import logging

import typer

import budwood
from budwood.cli import bench, demo, ls, points, tune
from budwood.cli.classify import classify
from budwood.cli.commands import App
from budwood.cli.compare import compare
from budwood.cli.errors import Commands
from budwood.cli.page import page
from budwood.cli.prune import prune
from budwood.cli.report import report
from budwood.cli.scan import scan
from budwood.cli.serve import PASSED_ON, serve

app = App(
    name="budwood",
    cls=Commands,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo", short_help="See pruning at work, offline, in half a minute.")(demo.demo)
app.command("prune", short_help="Ask about a picture with all visual tokens and with few.")(prune)
app.command("compare", short_help="Compare several pruning methods on one picture.")(compare)
app.command(
    "serve",
    short_help="Serve a model with pruned images, through vLLM.",
    context_settings=PASSED_ON,
)(serve)
app.add_typer(
    tune.app, name="tune", short_help="Fine-tune a language model so that it forgets little."
)
app.command("classify")(classify)
app.command("scan")(scan)
app.add_typer(points.app, name="points")
app.add_typer(ls.app, name="ls")
app.command("report", short_help="Write benchmark records as one HTML page.")(report)
app.command("app", short_help="Serve a page that shows all three abilities.")(page)
app.add_typer(bench.app, name="bench", short_help="Run benchmarks and print their tables.")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """New abilities for frozen pretrained transformers.

    \b
    prune     a vision-language model answers from a tenth of its visual tokens
    tune      a language model learns a task and forgets little of what it knew
    classify  objects of a few dozen points get labels from your own list
    scan      the objects in frames of a LiDAR or depth camera get boxes and labels

    Everything runs offline on embedded models; --model takes your own. Bad input ends with one
    line on standard error and exit code 2.

    \b
    Examples:
      budwood demo
      budwood prune photo.jpg "What is on the table?" --keep 0.1 --overlay kept.png
      budwood tune train.jsonl --output tuned
      budwood classify chair.ply --labels chair,table,"desk lamp" --points 64
    """
    if version:
        typer.echo(f"budwood {budwood.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


# PEFT imports bitsandbytes, which logs what it lacks for 4-bit weights.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line."""
    # Imports make a million objects that stay; looking through them again and again takes 0.5 s.
    gc.set_threshold(100_000, 50, 50)
    app(prog_name="budwood")
