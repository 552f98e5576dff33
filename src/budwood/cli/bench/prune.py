"""`budwood bench prune`: accuracy and retention per method and budget."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood import records
from budwood.checks import need_at_least
from budwood.cli import options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import progress, say
from budwood.cli.results import Results
from budwood.errors import InputError
from budwood.loading import SPROUT_256, load_vlm_model

if TYPE_CHECKING:
    from budwood.bench.prune import Config
    from budwood.bench.prune.earlier import Earlier
    from budwood.bench.prune.plan import Run
    from budwood.cli.models import Loaded

COLUMNS = Columns(
    Column("method", only="record"),
    Column("curve", heading="method", only="terminal"),
    Column("question", only="record"),
    Column("positions", only="record"),
    Column("keep"),
    Column("n_kept", ".0f", "tokens"),
    Column("accuracy", ".1%", only="record"),
    Column("accuracy_low", ".1%", only="record"),
    Column("accuracy_high", ".1%", only="record"),
    Column("accuracy_interval", heading="accuracy", only="terminal"),
    Column("retention", ".1%"),
    Column("difference", "+.1%", "difference to reference", only="record"),
    Column("difference_low", "+.1%", only="record"),
    Column("difference_high", "+.1%", only="record"),
    Column("difference_interval", heading="difference", only="terminal"),
    Column("best", heading="best other", only="record"),
    Column("best_difference", "+.1%", "difference to best other", only="record"),
    Column("best_difference_low", "+.1%", only="record"),
    Column("best_difference_high", "+.1%", only="record"),
    Column("question_difference", "+.1%", "difference to first question", only="record"),
    Column("question_difference_low", "+.1%", only="record"),
    Column("question_difference_high", "+.1%", only="record"),
    Column("accuracy_salient", ".1%", "salient"),
    Column("accuracy_other", ".1%", "other"),
    Column("ttft_ms", ".0f", "TTFT ms"),
    Column("speedup", ".2f", "speed-up"),
    Column("select_ms", ".1f", "select ms"),
)


def bench_prune(
    methods: options.BenchMethods = "adav+,adav,adav-contrast,scope,fastervlm,random,uniform",
    keep: options.Keeps = "0.1,0.05",
    scenes: Annotated[
        int, typer.Option(help="Scenes, each with one question of every kind that it allows.")
    ] = 200,
    seed: Annotated[
        int, typer.Option(help="Seed of scenes, random draws and intervals, 0 to 999.")
    ] = 0,
    split: Annotated[
        str, typer.Option(help="test; or shifted, with looks outside the training range.")
    ] = "test",
    high_resolution: Annotated[
        bool | None,
        typer.Option(
            "--high-resolution/--small-pictures",
            help="672 px and other shapes with many small objects, the default but for "
            "sprout-256; or 336 px.",
        ),
    ] = None,
    question: options.Questions = "all",
    positions: options.SeveralPositions = "own",
    turns: Annotated[
        int, typer.Option(help="Questions in a chat, each about other objects; the last counts.")
    ] = 1,
    compat: options.Compat = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Differences are to this one of --methods; by default to adav."),
    ] = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch: Annotated[int, typer.Option(help="Questions answered at a time.")] = 24,
    timed: Annotated[int, typer.Option(help="Questions whose first token is timed.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 4,
    workers: Annotated[
        int,
        typer.Option(help="Processes that answer, each with a copy of the model; for CPUs."),
    ] = 1,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RECORD",
            help="Take over the answers of an earlier record to the same questions and ask only "
            "the rest. Can be given several times.",
        ),
    ] = None,
    out: options.Out = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against budget.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure the accuracy of each method and budget on held-out scenes.

    "full" has all visual tokens, "blind" all tokens of a grey picture. An answer counts if it
    equals the right one up to case, space and punctuation. Intervals are 95 % intervals of a
    bootstrap over scenes, paired for differences and retention. Times are medians over questions
    asked one at a time, in turn. With --turns 2 a chat comes before each question, about other
    objects and with right answers. An interrupted run with --out continues where it was.
    --reuse adds methods, budgets or scenes to a comparison without repeating it.

    \b
    Examples:
      budwood bench prune --scenes 200 --keep 0.1,0.05 --out record.json --plot curve.png
      budwood bench prune --methods adav,mmtok --reuse record.json --out more.json
    """
    config = _config(
        methods=methods,
        keep=keep,
        compat=compat,
        question=question,
        positions=positions,
        seed=seed,
        n_scenes=scenes,
        split=split,
        high_resolution=model != SPROUT_256 if high_resolution is None else high_resolution,
        batch=batch,
        max_new_tokens=max_new_tokens,
        n_timed=timed,
        turns=turns,
        reference=reference,
    )
    need_at_least(1, workers=workers)
    results = Results(out, force, json, plot, resumes=True, reads=reuse or ())
    record = _measure(config, (model, device, dtype), results, workers, reuse or [])
    from budwood.bench.report import labelled

    shown = [_shown(row) for row in labelled(record.rows)]
    results.publish(record, COLUMNS, rows=shown, notes=[_legend(record.config)], draw=_draw)


def _config(
    *, methods: str, keep: str, compat: str | None, question: str, positions: str, **rest: Any
) -> Config:
    from budwood.bench.prune import Config, variants_of

    variants = variants_of(
        options.listed(methods), compat, options.listed(question), options.listed(positions)
    )
    keeps = tuple(options.keep_of(item) for item in options.listed(keep))
    _check_scenes(rest["seed"], rest["n_scenes"], rest["split"])
    return Config(tuple(variants), keeps, **rest)


def _check_scenes(seed: int, n_scenes: int, split: str) -> None:
    """Check split and seed before the model is loaded."""
    from budwood.sprout.questions import check_set

    check_set(seed, n_scenes, split)


def _measure(
    config: Config,
    source: tuple[str | None, str, str],
    results: Results,
    n_workers: int,
    reuse: Sequence[Path],
) -> records.Record:
    from budwood.bench.prune import Workers, counts, rows_of, run
    from budwood.cli.models import load
    from budwood.halves import rounded_products

    earlier = {path: records.read(path) for path in reuse}
    loaded = load(*source)
    described = _described(config, loaded)
    known = _known(earlier, described, config)
    if earlier:
        described["reused"] = [_origin(path, record) for path, record in earlier.items()]
    empty = records.new_record("bench prune", [], seed=config.seed, config=described)
    begun = results.begun(empty)
    with contextlib.ExitStack() as stack:
        stack.enter_context(rounded_products())
        workers = None
        if n_workers != 1:
            workers = stack.enter_context(Workers(n_workers, partial(load_vlm_model, *source)))
        outcome = run(
            loaded.model,
            loaded.processor,
            config,
            stack.enter_context(progress("answers")),
            begun,
            lambda rows: results.keep(dataclasses.replace(empty, rows=rows)),
            workers and workers.answers,
            known,
        )
    rows = rows_of(outcome, config)
    return records.new_record(
        "bench prune", rows, seed=config.seed, config=empty.config | counts(outcome)
    )


def _known(
    earlier: Mapping[Path, records.Record], described: dict[str, Any], config: Config
) -> dict[Run, Earlier]:
    from budwood.bench.prune import earlier_answers

    known: dict[Run, Earlier] = {}
    for path, record in earlier.items():
        try:
            found = earlier_answers(record, described, config)
        except InputError as error:
            raise InputError(f"{path} {error}") from None
        say(f"takes over {len(found)} of {len(config.runs)} runs from {path}")
        known |= found
    return known


def _origin(path: Path, record: records.Record) -> dict[str, Any]:
    """Where answers that were taken over come from."""
    keys = ("command", "created", "git", "versions", "hardware")
    reused = record.config.get("reused", [])
    return {"file": path.name, **{key: getattr(record, key) for key in keys}, "reused": reused}


def _described(config: Config, loaded: Loaded) -> dict[str, Any]:
    from budwood.fingerprint import fingerprint_of

    plain = dataclasses.asdict(config) | {"keeps": list(config.keeps)}
    plain["variants"] = [dataclasses.asdict(variant) for variant in config.variants]
    return plain | {
        "model": loaded.name,
        "weights": fingerprint_of(loaded.model),
        "dtype": loaded.dtype,
        "device": loaded.device,
    }


def _draw(rows: list[records.Row], path: Path) -> None:
    from budwood.bench.plots import plot_lines
    from budwood.bench.report import labelled

    curves = [row for row in labelled(rows) if row["method"] not in ("full", "blind")]
    full = next(row["accuracy"] for row in rows if row["method"] == "full")
    plot_lines(
        curves,
        path,
        x="n_kept",
        y="accuracy",
        by="curve",
        low="accuracy_low",
        high="accuracy_high",
        baseline=full,
        baseline_label="all tokens",
        log=True,
    )


def _shown(row: records.Row) -> records.Row:
    """Put each interval of a row into one cell."""
    return row | {
        "accuracy_interval": _interval(row, "accuracy", ".1%"),
        "difference_interval": _interval(row, "difference", "+.1%"),
    }


def _interval(row: records.Row, key: str, spec: str) -> str | None:
    value, low, high = (row[key + end] for end in ("", "_low", "_high"))
    if value is None:
        return None
    return format(value, spec) + (f" [{low:{spec}}, {high:{spec}}]" if low is not None else "")


def _legend(config: dict[str, Any]) -> str:
    fraction = config["n_salient"] / config["n_questions"]
    chats = f"in chats of {config['turns']} turns " if config["turns"] > 1 else ""
    size = "high-resolution " if config["high_resolution"] else ""
    reference = config["reference"]
    differences = f"differences are to {reference} at the same budget; " if reference else ""
    return (
        f"{config['n_questions']} questions {chats}about {config['n_scenes']} {size}scenes, seed "
        f"{config['seed']}, split {config['split']}; {fraction:.0%} of them about the salient "
        f"object; {differences}"
        f"model {config['model']}, {config['dtype']}"
    )
