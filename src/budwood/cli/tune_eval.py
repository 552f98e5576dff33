"""`budwood tune eval`: target and general tasks before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood import records
from budwood.cli import options, tune_options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import progress, say, warnings_said
from budwood.cli.results import Results
from budwood.errors import InputError
from budwood.loading import SMOLLM2, check_adapter_source, check_source

if TYPE_CHECKING:
    from budwood.loading import Loaded
    from budwood.tune.data.encoding import EncodedExample
    from budwood.tune.evaluate.base_results import Kept
    from budwood.tune.evaluate.suite import Suite

COLUMNS = Columns(
    Column("group"),
    Column("task"),
    Column("metric"),
    Column("n", heading="items"),
    Column("floor", ".3f"),
    Column("before", ".3f"),
    Column("after", ".3f"),
    Column("difference", "+.3f"),
    Column("low", "+.3f", "95 % from"),
    Column("high", "+.3f", "to"),
)


def tune_eval(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder or hub id of a PEFT adapter.")
    ],
    model: tune_options.Base = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="TASK|FILE,…", help="Tasks or files that it was trained for."),
    ] = None,
    general: Annotated[
        str | None,
        typer.Option(metavar="TASK|FILE,…", help="Tasks or files that it should not forget."),
    ] = None,
    data: tune_options.Data = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plain text to measure perplexity and KL on."),
    ] = None,
    style: tune_options.Style = "cloze",
    limit: tune_options.Limit = 0,
    windows: tune_options.Windows = 64,
    prompts: tune_options.Prompts = 64,
    batch: tune_options.EvalBatch = 16,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Measure the base model again; do not use its scores in the cache."
        ),
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the weight on identity experts by layer."),
    ] = None,
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Score an adapter and its base model on target tasks, general tasks and text.

    A task is a file with lines as for `budwood tune`, or facts, extract or reviews, which bring
    their data, or a task of lm-eval. The floor is the better of the base model and the best
    constant answer. With --data DIR alone, the shipped tasks are scored: openbookqa, boolq and
    arc_easy as targets, winogrande, social_iqa and gsm8k as general tasks, and perplexity on
    wikitext2_valid.txt. KL is the divergence from the base model, on text and on its own replies to
    everyday requests. Intervals are 95 % intervals of a paired bootstrap over items. The base
    model's scores and replies are kept in budwood's cache for the next adapter.

    \b
    Examples:
      budwood tune eval tuned --target test.jsonl --text general.txt --out record.json
      budwood tune eval tuned --data tasks --limit 500
    """
    check_adapter_source(adapter)
    check_source(model, SMOLLM2)

    from budwood.tune.data.examples import check_first_row, check_style

    check_style(style)
    for source in options.listed(target or "") + options.listed(general or ""):
        check_first_row(source, style)

    from budwood.checks import need_at_least
    from budwood.cli.models import load_adapted
    from budwood.tune.evaluate.base_results import Kept
    from budwood.tune.evaluate.divergence import chat_prompts
    from budwood.tune.evaluate.suite import Suite

    need_at_least(0, limit=limit, windows=windows, prompts=prompts, seed=seed)
    need_at_least(1, batch=batch)
    chat_prompts(prompts)  # refuses more than there are, before a model is loaded
    sources = [*options.listed(target or ""), *options.listed(general or ""), text]
    results = Results(out, force, json, plot, reads=sources)
    tasks = _tasks(target, general, data, limit, seed)
    text = _text(text, data)
    if not tasks and text is None and not prompts:
        raise InputError("nothing to evaluate: give --target, --general, --text or --data")
    shown = any(task.examples for task in tasks if task.group == "target")
    if plot and not (shown or text or prompts):
        raise InputError("--plot has no text to show: give --text, --prompts, or files as --target")
    loaded = load_adapted(adapter, model, device, dtype)
    _check_drawn(loaded, adapter, plot)
    if prompts and not getattr(loaded.tokenizer, "chat_template", None):
        if not tasks and text is None:
            raise InputError(
                "nothing to evaluate: the tokenizer has no chat template, and so the base model no "
                "replies; give --target, --general, --text or --data"
            )
        say("note: no divergence on replies is measured, since the tokenizer has no chat template")
        prompts = 0
    kept = None if fresh else Kept.of(loaded.model, loaded.tokenizer)
    texts = _texts(loaded, text, windows, prompts, seed, kept)
    suite = Suite(tasks, texts, style, batch, limit)
    # Refuses what it cannot tell apart, before the slow work.
    routed = suite.routed(loaded.model, loaded.tokenizer) if plot else {}
    name = Path(adapter).resolve().name
    with warnings_said(r"\d+ of \d+ prompts "):
        rows = [{"adapter": name, **row} for row in _measure(loaded, suite, seed, kept)]
    record = records.new_record(
        "tune eval",
        rows,
        seed=seed,
        config={
            "model": loaded.name,
            "adapter": name,
            "dtype": loaded.dtype,
            "style": style,
            "limit": limit,
            "windows": windows,
            "prompts": prompts,
        },
    )
    results.publish(record, COLUMNS, draw=lambda _, part: _draw(loaded, routed, part))


def _tasks(
    target: str | None, general: str | None, data: Path | None, limit: int, seed: int
) -> tuple[Any, ...]:
    from budwood.tune.evaluate.suite import GENERAL, TARGETS
    from budwood.tune.evaluate.tasks import find_tasks

    if data is not None and not data.is_dir():
        raise InputError(f"there is no folder {data}; give one with the files of the tasks")
    whole = data is not None and target is None and general is None
    targets = TARGETS if whole else options.listed(target or "")
    others = GENERAL if whole else options.listed(general or "")
    return find_tasks(targets, others, data, limit, seed)


def _text(text: Path | None, data: Path | None) -> Path | None:
    from budwood.tune.evaluate.divergence import text_name
    from budwood.tune.evaluate.suite import TEXT

    if text is not None and not text.is_file():
        raise InputError(f"there is no file {text}")
    if text is not None:
        text_name(text)  # refuses some, before a model is loaded
    if text is None and data is not None and (data / TEXT).exists():
        return data / TEXT
    return text


def _texts(
    loaded: Loaded,
    text: Path | None,
    windows: int,
    prompts: int,
    seed: int,
    kept: Kept | None,
) -> dict[str, list[EncodedExample]]:
    from budwood.tune.evaluate.divergence import make_texts

    with progress("replies of the base model") as bar:
        return make_texts(
            loaded.model,
            loaded.tokenizer,
            text=text,
            n_windows=windows,
            n_prompts=prompts,
            seed=seed,
            progress=bar,
            kept=kept,
        )


def _measure(loaded: Loaded, suite: Suite, seed: int, kept: Kept | None) -> list[dict[str, Any]]:
    from budwood.tune.evaluate.scores import report_rows

    with progress("before") as bar:
        before = suite.before(loaded.model, loaded.tokenizer, bar, kept)
    with progress("after") as bar:
        after = suite.after(loaded.model, loaded.tokenizer, bar)
    with progress("texts") as bar:
        text_before, text_after = suite.drift(loaded.model, loaded.tokenizer, bar)
    if kept and kept.n_found:
        say("the base model's scores or replies were kept from before; --fresh measures them again")
    constants = {task.name: task.constant for task in suite.tasks if task.constant is not None}
    return report_rows(before + text_before, after + text_after, seed, constants)


def _check_drawn(loaded: Loaded, adapter: str, plot: Path | None) -> None:
    from budwood.tune.slim.keeper import is_slim

    if plot and not is_slim(loaded.model):
        raise InputError(
            f"--plot draws where SLIM sends text, and {adapter} is not a SLIM adapter; leave it out"
        )


def _draw(loaded: Loaded, texts: dict[str, list[EncodedExample]], path: Path) -> None:
    from budwood.bench.plots import plot_identity
    from budwood.tune.evaluate.suite import routing_rows

    plot_identity(routing_rows(loaded.model, loaded.tokenizer, texts), path)
