"""`budwood bench tune`: SLIM beside LoRA and others, learning and forgetting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood import records
from budwood.cli import options, tune_options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import print_json, print_table, progress, say
from budwood.errors import InputError
from budwood.figures import need_matplotlib
from budwood.files import need_parent, write_whole

if TYPE_CHECKING:
    from budwood.bench.tune.comparison import Comparison
    from budwood.bench.tune.plan import Plan

COLUMNS_OF_RUNS = Columns(
    Column("method"),
    Column("lr", ".0e"),
    Column("seed"),
    Column("params", ","),
    Column("validation", ".1%"),
    Column("validation_loss", ".2f"),
    Column("perplexity", ".2f"),
    Column("kl_chat", ".3f"),
    Column("kl_text", ".3f"),
)
"""Of single runs, which are tested only if they are chosen."""

COLUMNS = Columns(
    Column("method"),
    Column("lr", ".0e"),
    Column("params", ",", "parameters"),
    Column("n_seeds", heading="seeds"),
    Column("target", ".1%"),
    Column("target_std", ".1%", "±"),
    Column("target_gain", "+.1%", "gain"),
    Column("target_floor", ".1%", "floor"),
    Column("target_over_floor", "+.1%", "over floor"),
    Column("general", ".1%"),
    Column("general_loss_rise", "+.3f", "loss rise"),
    Column("loss_rise_gsm8k", "+.3f", "GSM8K"),
    Column("perplexity", ".2f", only="record"),
    Column("perplexity_rise", "+.2f", "perplexity rise"),
    Column("text_loss_rise", "+.4f", only="record"),
    Column("kl_chat", ".4f", "KL chat"),
    Column("kl_text", ".4f", "KL text"),
    Column("kl_chat_ratio", ".2f", "KL / LoRA's"),
    Column("perplexity_rise_ratio", ".2f", only="record"),
)


def bench_tune(
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with training, test and general data.")
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the comparison; an interrupted one continues."),
    ],
    methods: options.Tuners = "lora,lora-wd,dora,lora-kl,moe,slim",
    targets: Annotated[
        str, typer.Option(metavar="TASK,…", help="Tasks to train on, all together.")
    ] = "facts,extract,reviews",
    general: Annotated[
        str, typer.Option(metavar="TASK,…", help="Tasks that are never trained on.")
    ] = "winogrande,social_iqa,gsm8k",
    strengths: Annotated[
        str,
        typer.Option(
            metavar="S,…",
            help="Adapter strengths below 1 at which every run is measured as well (WiSE-FT).",
        ),
    ] = "",
    lrs: Annotated[
        str,
        typer.Option(
            metavar="RATE,…",
            help="Learning rates to try with each method; `tried`: those in --output.",
        ),
    ] = "1e-3,3e-3,1e-2",
    seeds: Annotated[
        str, typer.Option(metavar="N,…", help="Seeds of the final runs; the first is the sweep's.")
    ] = "0,1,2",
    reference: Annotated[
        str, typer.Option(help="Method whose number of trained parameters the others get.")
    ] = "slim",
    rank: Annotated[
        int, typer.Option(help="Rank of the reference, or of each of its experts.")
    ] = 4,
    steps: Annotated[int, typer.Option(help="Optimiser steps per run.")] = 300,
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    max_length: Annotated[
        int, typer.Option(help="Longest example in tokens; longer ones are left out.")
    ] = 192,
    per_task: Annotated[int, typer.Option(help="Training examples per task, at most.")] = 2000,
    n_validation: Annotated[int, typer.Option(help="Validation examples per task.")] = 200,
    limit: Annotated[int, typer.Option(help="Test questions per task; 0: all.")] = 0,
    general_limit: Annotated[int, typer.Option(help="Questions per general task; 0: all.")] = 400,
    windows: tune_options.Windows = 48,
    prompts: tune_options.Prompts = 48,
    probe_every: Annotated[
        int, typer.Option(help="Steps between points of the curve; 0: no curve.")
    ] = 75,
    probe_limit: Annotated[int, typer.Option(help="Questions per task at each point.")] = 40,
    style: tune_options.Style = "cloze",
    eval_batch: tune_options.EvalBatch = 16,
    model: tune_options.Model = None,
    device: options.Device = "auto",
    dtype: tune_options.TrainingDtype = "auto",
    json: options.Json = False,
) -> None:
    """Train on tasks with each method, choose its learning rate, and see what is forgotten.

    The targets facts, extract and reviews bring their data. DIR holds wikitext2_valid.txt, the
    general tasks, and NAME_train.jsonl and NAME_test.jsonl for other targets, such as openbookqa,
    boolq and arc_easy. Validation questions choose the learning rates, and only chosen rates are
    tested. The floor of a target is the better of the base model and the best constant answer.
    --output gets a record per run, the record of the comparison, and plots. Repeat the command to
    continue an interrupted comparison. You may add methods, rates and seeds; rates that were tried
    before count.

    \b
    Example:
      budwood bench tune --data nlp --output comparison --methods lora,slim --seeds 0
    """
    plan = _plan(
        methods,
        lrs,
        seeds,
        _settings(steps, batch, max_length, probe_every),
        targets=tuple(options.listed(targets)),
        general=tuple(options.listed(general)) if general else (),
        strengths=tuple(_numbers(strengths, float, "strengths")) if strengths else (),
        reference=reference,
        rank=rank,
        per_task=per_task,
        n_validation=n_validation,
        limit=limit,
        general_limit=general_limit,
        windows=windows,
        prompts=prompts,
        probe_limit=probe_limit,
        style=style,
        batch=eval_batch,
    )
    if not data.is_dir():
        raise InputError(f"there is no folder {data}; give one with the data")
    need_parent(output)
    need_matplotlib()
    record, pictures = _compare(plan, data, output, model, device, dtype)
    if json:
        print_json(dataclasses.asdict(record))
        return
    print_table(record.rows, COLUMNS)
    _print_targets(record.rows, plan.targets)
    say(f"in {output}: record.json, {', '.join(pictures)}, runs")


def _print_targets(rows: list[dict[str, Any]], targets: tuple[str, ...]) -> None:
    """Each target by itself, with its floor."""
    if not any(f"floor_{name}" in row for row in rows for name in targets):
        return
    columns = [Column("method")]
    for name in targets:
        columns += [
            Column(f"accuracy_{name}", ".1%", name),
            Column(f"floor_{name}", ".1%", "floor"),
        ]
    print_table(rows, Columns(*columns))


def _settings(steps: int, batch: int, max_length: int, probe_every: int) -> Any:
    from budwood.tune.training.settings import Settings

    if steps < 1:
        raise InputError(f"steps={steps} is below 1")
    return Settings(
        steps=steps, batch=batch, max_length=max_length, probe_every=probe_every, save_every=100
    )


def _plan(methods: str, lrs: str, seeds: str, settings: Any, **rest: Any) -> Plan:
    from budwood.bench.tune.plan import Plan

    return Plan(
        methods=tuple(options.listed(methods)),
        lrs=() if lrs == "tried" else tuple(_numbers(lrs, float, "lrs")),
        seeds=tuple(_numbers(seeds, int, "seeds")),
        settings=settings,
        **rest,
    )


def _numbers(text: str, kind: Any, name: str) -> list[Any]:
    try:
        numbers = [kind(item) for item in options.listed(text)]
    except ValueError as error:
        raise InputError(
            f"{name}={text!r} contains something other than numbers: {error}"
        ) from error
    if not numbers:
        raise InputError(f"{name} is empty; give numbers with commas")
    return numbers


def _compare(
    plan: Plan, data: Path, output: Path, model: str | None, device: str, dtype: str
) -> tuple[records.Record, list[str]]:
    from budwood.bench.tune.comparison import Comparison
    from budwood.bench.tune.rows import method_rows
    from budwood.cli.models import load_language_model
    from budwood.halves import rounded_products
    from budwood.loading import third_party_warnings_off
    from budwood.tune.training.run import check_trainable

    loaded = load_language_model(model, device, dtype)
    check_trainable(loaded.model)
    with third_party_warnings_off(), rounded_products():
        comparison = Comparison(
            plan, loaded.name, loaded.model, loaded.tokenizer, data, output, progress, say
        )
        runs = comparison.run()
    rows = method_rows(runs)
    config = dataclasses.asdict(plan) | {"model": loaded.name, "dtype": loaded.dtype}
    config |= {"n_train": len(comparison.rows), "runs": runs}
    record = records.new_record("bench tune", rows, seed=plan.seeds[0], config=config)
    records.write(record, output / "record.json", overwrite=True)
    return record, _draw(comparison, runs, output)


def _draw(comparison: Comparison, runs: list[dict[str, Any]], output: Path) -> list[str]:
    """Draw what there is; returns the names of the pictures."""
    from budwood.bench.plots import plot_curves, plot_front, plot_identity

    histories, routing = comparison.histories(runs), comparison.routing(runs)
    pictures: dict[str, Callable[[Path], Path]] = {"front.png": lambda part: plot_front(runs, part)}
    if any(row.get("probe") for history in histories.values() for row in history):
        pictures["curves.png"] = lambda part: plot_curves(histories, part)
    if routing:
        pictures["identity.png"] = lambda part: plot_identity(routing, part)
    for name, draw in pictures.items():
        write_whole(output / name, draw)
    return list(pictures)
