"""`budwood tune`: fine-tune, evaluate and export an adapter."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from budwood.cli import options, tune_options
from budwood.cli.columns import Column, Columns
from budwood.cli.commands import App
from budwood.cli.console import print_json, print_table, progress, say, warnings_said
from budwood.cli.tune_eval import tune_eval
from budwood.cli.tune_export import export_lora
from budwood.cli.tune_push import push, upload
from budwood.errors import InputError
from budwood.files import need_parent

if TYPE_CHECKING:
    from budwood.tune.finetuning import FinetuneResult


class _RunByDefault(TyperGroup):
    """`budwood tune FILE` is `budwood tune run FILE`, and `budwood tune --help` is its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, "--help"}
        if args and args[0] not in known:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and not Path(args[0]).exists():
                raise InputError(
                    f"{args[0]} is neither a command nor a file; did you mean "
                    f"`budwood tune {near[0]}`? For a dataset on the hub with that name: "
                    f"`budwood tune run {args[0]}`"
                )
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        run = self.commands["run"]
        run.format_help(run.context_class(run, ctx.parent, info_name=ctx.info_name), formatter)
        self.format_commands(ctx, formatter)


app = App(cls=_RunByDefault)
app.command("eval", short_help="Score an adapter and its base model.")(tune_eval)
app.command("push", short_help="Put an adapter on the hub.")(push)
app.command("export-lora", short_help="Write an ordinary LoRA from an adapter.")(export_lora)


@app.callback(invoke_without_command=True)
def tune(context: typer.Context) -> None:
    """Fine-tune a language model so that it forgets little, and evaluate it.

    `budwood tune FILE …` is short for `budwood tune run FILE …`.

    \b
    Examples:
      budwood tune train.jsonl --output tuned
      budwood tune eval tuned --target test.jsonl
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


COLUMNS = Columns(
    Column("step"),
    Column("loss", ".3f"),
    Column("lr", ".2g", "learning rate"),
    Column("identity_share", ".2f", "weight on identity experts"),
    Column("distance", ".2f"),
    Column("seconds", ".0f"),
)
_SHOWN_ROWS = 10


@app.command("run", short_help="Fine-tune; `budwood tune FILE` is short for it.")
def run(
    train: Annotated[
        list[str],
        typer.Argument(metavar="TRAIN…", help="Files of examples, or hub ids (NAME:CONFIG)."),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder for the adapter, one run per folder.")
    ],
    model: tune_options.Model = None,
    method: options.Tuner = "slim",
    rank: Annotated[int, typer.Option(help="Rank of the adapter, or of each expert.")] = 4,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default: 3e-3, and lower for models wider than 576."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[
        int, typer.Option(help="Optimiser steps, instead of --epochs; 0 for --epochs.")
    ] = 0,
    batch: Annotated[int, typer.Option(help="Examples in one forward pass.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Forward passes per step.")] = 1,
    warmup: Annotated[
        float, typer.Option(help="Fraction of the steps in which the learning rate rises.")
    ] = 0.05,
    schedule: Annotated[
        str, typer.Option(help="Learning rate schedule: cosine, linear, constant, ….")
    ] = "cosine",
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Held-out examples: measure their loss while training, and keep the adapter with "
            "the lowest.",
        ),
    ] = None,
    eval_every: Annotated[
        int, typer.Option(help="Steps between measurements; 0 for ten in a run.")
    ] = 0,
    patience: Annotated[
        int,
        typer.Option(help="End after so many measurements without a lower loss; 0 for never."),
    ] = 0,
    max_length: Annotated[
        int, typer.Option(help="Longest example in tokens; longer ones are left out.")
    ] = 512,
    style: tune_options.Style = "cloze",
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Save memory by recomputing activations; slower."),
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    log_every: Annotated[int, typer.Option(help="Steps between rows of the history.")] = 10,
    report_to: Annotated[
        str, typer.Option(metavar="NAME,…", help="Trackers: tensorboard, wandb, mlflow, ….")
    ] = "",
    push_to: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="ID", help="Put the adapter on the hub at the end."),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: tune_options.TrainingDtype = "auto",
    json: options.Json = False,
) -> None:
    """Fine-tune a language model on examples, with the loss on the answers only.

    Files are JSON lines, JSON arrays, CSV, TSV or Parquet. A row is one of {"messages": [...]},
    {"conversations": [...]}, {"prompt": ..., "completion": ...}, {"instruction": ..., "output":
    ...}, {"question": ..., "choices": [...], "answer": index or letter}, {"question": ...,
    "answer": text} and {"text": ...}. Ctrl-C writes a checkpoint and ends the run. Repeat the
    command to continue an interrupted run from its last checkpoint.

    \b
    Examples:
      budwood tune train.jsonl --output tuned
      budwood tune eval tuned --target test.jsonl
    """
    from budwood.cli.models import SLOW, be_quiet
    from budwood.loading import check_data_source, check_source, third_party_warnings_off
    from budwood.tune.data.examples import check_first_row

    need_parent(output)
    for source in [*train, *(evaluate or [])]:
        check_data_source(source)
    check_source(model, "smollm2")
    if push_to:
        _check_push(push_to, model)
    for source in [*train, *(evaluate or [])]:
        check_first_row(source, style)

    from budwood.tune import Settings, finetune

    settings = Settings(
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        warmup=warmup,
        schedule=schedule,
        eval_every=eval_every,
        patience=patience,
        max_length=max_length,
        checkpointing=checkpointing,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
        report_to=tuple(options.listed(report_to)) if report_to else (),
    )
    be_quiet()
    with (
        warnings_said("left out ", r"\d+ examples make ", SLOW),
        third_party_warnings_off(),
        progress("tune") as bar,
    ):
        result = finetune(
            "smollm2" if model is None else model,
            train,
            output,
            eval_data=evaluate,
            method=method,
            rank=rank,
            args=settings,
            style=style,
            device=device,
            dtype=dtype,
            progress=bar,
        )
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes speaks
    if push_to:
        upload(output, push_to)
    if json:
        print_json(_summary(result, method, rank))
    else:
        _print(result, method)


def _check_push(repo_id: str, model: str | None) -> None:
    """Refuse before the training what could not be pushed after it."""
    from budwood.loading import is_path
    from budwood.tune.saved.publish import check_hub

    if model and is_path(model):
        raise InputError(
            f"--push-to-hub with the local base model {model}, which nobody else can load; train "
            "without it, then `budwood tune push ADAPTER ID --base HUB_ID`"
        )
    check_hub(repo_id)


def _summary(result: FinetuneResult, method: str, rank: int) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "model": result.model_name,
        "method": method,
        "rank": rank,
        "params": result.n_trained_parameters,
        "n_examples": result.n_examples,
        "history": result.history,
    }


def _print(result: FinetuneResult, method: str) -> None:
    if result.was_complete:
        say(f"the run in {result.output} is complete; nothing was trained")
    rows = [row for row in result.history if "loss" in row]
    every = max(1, len(rows) // _SHOWN_ROWS)
    shown = rows[::-every][::-1]
    if shown:
        print_table(shown, COLUMNS.present_in(shown[-1]))
    measured = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    if result.best_step is not None:
        say(
            f"validation loss: {measured[0]:.3f} before training, {measured[result.best_step]:.3f} "
            f"after step {result.best_step}, whose adapter is kept"
        )
    say(
        f"{method} with {result.n_trained_parameters:,} trained parameters on "
        f"{result.n_examples} examples; the adapter is in {result.output}.\n"
        f"Next: budwood tune eval {result.output} --target TEST.jsonl"
    )
