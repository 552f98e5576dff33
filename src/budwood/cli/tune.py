"""`budwood tune`: fine-tune, evaluate and export an adapter."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from budwood import records
from budwood.cli import options, tune_options
from budwood.cli.console import print_json, print_table, progress, say
from budwood.cli.tune_eval import tune_eval
from budwood.cli.tune_export import export_lora
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.cli.language_models import LanguageModel
    from budwood.runs import RunFolder
    from budwood.tune.data import Example
    from budwood.tune.encoding import Row
    from budwood.tune.methods import Tuner
    from budwood.tune.train import Settings


class _RunByDefault(TyperGroup):
    """`budwood tune FILE` is `budwood tune run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, "--help"}
        if args and args[0] not in known:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and not Path(args[0]).exists():
                raise InputError(
                    f"{args[0]} is neither a command nor a file; did you mean "
                    f"`budwood tune {near[0]}`? A dataset of the hub by that name: "
                    f"`budwood tune run {args[0]}`"
                )
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(rich_markup_mode=None, cls=_RunByDefault)
app.command("eval")(tune_eval)
app.command("export-lora")(export_lora)


@app.callback(invoke_without_command=True)
def tune(context: typer.Context) -> None:
    """Fine-tune a language model so that it forgets little else; see what it learnt.

    `budwood tune FILE …` is short for `budwood tune run FILE …`.

    \b
    Example:
      budwood tune train.jsonl --output tuned
      budwood tune eval tuned --target test.jsonl
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_COLUMNS = {
    "step": ("step", ""),
    "loss": ("loss", ".3f"),
    "lr": ("learning rate", ".2g"),
    "identity_share": ("identity share", ".2f"),
    "distance": ("distance", ".2f"),
    "seconds": ("seconds", ".0f"),
}
_SHOWN_ROWS = 10


@app.command("run")
def run(
    train: Annotated[
        list[str],
        typer.Argument(
            metavar="TRAIN.jsonl…", help="Files of chats or questions, or hub ids (NAME:CONFIG)."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the adapter goes; one run a folder.")
    ],
    model: tune_options.Model = None,
    method: Annotated[
        str, typer.Option(metavar="NAME[:KEY=VALUE+…]", help="slim, or one of `budwood ls tuners`.")
    ] = "slim",
    rank: Annotated[int, typer.Option(help="Rank; of each expert where there are several.")] = 4,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; default: 3e-3, less for models wider than 576."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps, in place of epochs.")] = 0,
    batch: Annotated[int, typer.Option(help="Examples in one forward pass.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Forward passes a step.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising rate.")] = 0.05,
    schedule: Annotated[
        str, typer.Option(help="cosine, linear or constant_with_warmup.")
    ] = "cosine",
    max_length: Annotated[int, typer.Option(help="Longer examples are left out.")] = 512,
    style: tune_options.Style = "cloze",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations, to save memory.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    log_every: Annotated[int, typer.Option(help="Steps between rows of the history.")] = 10,
    seed: Annotated[int, typer.Option(help="Of initial weights and order.")] = 0,
    device: options.Device = "auto",
    dtype: tune_options.TrainingDtype = "auto",
    json: options.Json = False,
) -> None:
    """Fine-tune an adapter on answers; prompts are read and not learnt.

    A line of a file is {"messages": [...]}, {"question", "choices", "answer": index} or
    {"question", "answer": text}. A run that was cut off goes on from its last checkpoint when the
    command is repeated. On a loss that is no number it stops; the last good checkpoint stays.

    \b
    Example:
      budwood tune train.jsonl --output tuned --method slim --epochs 1
    """
    from budwood.checks import need_at_least
    from budwood.cli.language_models import load_language_model, third_party_warnings_off
    from budwood.runs import refuse_other_files
    from budwood.tune.data import read_examples
    from budwood.tune.methods import parse_tuner
    from budwood.tune.train import Settings, check_trainable

    settings = Settings(
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        warmup=warmup,
        schedule=schedule,
        max_length=max_length,
        checkpointing=checkpointing,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
    )
    parse_tuner(method)  # these refuse bad input before a model is loaded
    need_at_least(1, rank=rank)
    examples = [example for source in train for example in read_examples(source, style)]
    refuse_other_files(output)
    loaded = load_language_model(model, _of_this_process(device), dtype)
    check_trainable(loaded.model)
    with third_party_warnings_off():
        found = _run(loaded, examples, output, method, rank, settings)
    if not _is_first_process():
        return
    if json:
        print_json(found)
    else:
        _print(found)


def _run(
    loaded: LanguageModel,
    examples: list[Example],
    output: Path,
    method: str,
    rank: int,
    settings: Settings,
) -> dict[str, Any]:
    from accelerate import PartialState

    from budwood.runs import RunFolder
    from budwood.tune.encoding import n_learnt
    from budwood.tune.methods import attach, n_trainable, parse_tuner
    from budwood.tune.train import adapter_of, default_lr, fingerprint

    settings = dataclasses.replace(settings, lr=settings.lr or default_lr(loaded.model))
    rows = _encoded(loaded, examples, settings.max_length)
    tuner = parse_tuner(method).fitted_to(n_learnt(rows))
    adapted = attach(tuner, loaded.model, rank, settings.seed)
    state = PartialState(cpu=loaded.model.device.type == "cpu")
    with state.main_process_first():
        about = adapter_of(loaded.name, loaded.model, method, settings, rank, fingerprint(rows))
        folder = RunFolder(output, about)
    if folder.is_complete:
        say(f"the run in {output} is over; nothing is trained")
    found = {
        "output": str(output),
        "model": loaded.name,
        "method": method,
        "rank": rank,
        "params": n_trainable(adapted),
        "n_examples": len(rows),
        "history": _train(loaded, rows, tuner, adapted, settings, folder),
    }
    if state.is_main_process and not (output / "record.json").exists():
        _record(found, settings, output)
    return found


def _encoded(loaded: LanguageModel, examples: list[Example], max_length: int) -> list[Row]:
    from budwood.tune.encoding import encode, longest_for

    longest = longest_for(loaded.model, max_length)
    encoded = encode(examples, loaded.tokenizer, longest)
    if encoded.n_too_long:
        say(f"left out {encoded.n_too_long} examples of more than {longest} tokens")
    return encoded.rows


def _train(
    loaded: LanguageModel,
    rows: list[Row],
    tuner: Tuner,
    adapted: Any,
    settings: Settings,
    folder: RunFolder,
) -> list[dict[str, Any]]:
    from accelerate import PartialState

    from budwood.tune.train import train

    with PartialState().main_process_first():
        own = _own_text(folder, tuner, adapted, loaded)
    if folder.last_checkpoint() is None:
        tuner.prepare(adapted, loaded.tokenizer, rows, own)
    with progress("training") as advance:
        return train(
            adapted,
            loaded.tokenizer,
            rows,
            settings,
            folder,
            **tuner.training(own),
            advance=advance,
        )


def _own_text(folder: RunFolder, tuner: Tuner, adapted: Any, loaded: LanguageModel) -> list[Row]:
    """What the run still needs of text that the base model writes by itself."""
    from budwood.tune.own_text import kept_text

    needed = tuner.held_on_own or folder.last_checkpoint() is None
    if folder.is_complete or not (tuner.n_own and needed):
        return []
    with progress("text of the base model") as advance:
        return kept_text(folder.path / "own.json", adapted, loaded.tokenizer, tuner.n_own, advance)


def _record(found: dict[str, Any], settings: Settings, output: Path) -> None:
    config = {key: found[key] for key in ("model", "method", "rank", "params", "n_examples")}
    record = records.new_record(
        "tune",
        found["history"],
        seed=settings.seed,
        config=config | dataclasses.asdict(settings),
    )
    records.write(record, output / "record.json")


def _is_first_process() -> bool:
    """Whether this is the one of several processes that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _of_this_process(device: str) -> str:
    """Each process that a launcher starts has a GPU of its own."""
    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if device == "auto" and own and torch.cuda.is_available() else device


def _print(found: dict[str, Any]) -> None:
    losses = [row for row in found["history"] if "loss" in row]
    every = max(1, len(losses) // _SHOWN_ROWS)
    shown = losses[::-every][::-1]
    columns = {key: column for key, column in _COLUMNS.items() if shown and key in shown[-1]}
    if shown:
        print_table(shown, columns)
    say(
        f"{found['method']} with {found['params']:,} trained parameters on {found['n_examples']} "
        f"examples; the adapter is in {found['output']}.\n"
        f"Next: budwood tune eval {found['output']} --target TEST.jsonl"
    )
