"""`budwood bench prune-speed`: what pruning saves and what it costs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood import records
from budwood.cli import options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import working
from budwood.cli.results import Results
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.bench.prune.shapes import Shape
    from budwood.bench.prune.speed import SpeedConfig

COLUMNS = Columns(
    Column("model"),
    Column("method"),
    Column("keep"),
    Column("n_prompt", heading="prompt"),
    Column("ttft_ms", ".1f", "first token ms"),
    Column("encode_ms", ".1f", "encoder"),
    Column("select_ms", ".2f", "selector"),
    Column("prefill_ms", ".1f", "prefill"),
    Column("prefill_over_plain", ".3f", "÷ plain"),
    Column("prefill_over_full", ".3f", "÷ full"),
    Column("select_over_full", ".2%", "selector ÷ full prefill"),
    Column("decode_tokens_per_s", ".1f", "decode tokens/s"),
    Column("decode_over_full", ".3f", "÷ full"),
    Column("kv_mib", ".1f", "KV cache MiB"),
    Column("peak_mib", ".0f", "peak MiB"),
)


def bench_speed(
    keep: options.Keeps = "0.11,0.055",
    method: options.Method = "adav",
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…|all",
            help="Time random weights of published shapes, such as llava-next or qwen3-vl. Of "
            "several, widths are rounded down to whole heads.",
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="LLM layers of the shape.")] = 4,
    width: Annotated[int, typer.Option(help="LLM width of the shape.")] = 2048,
    vision_layers: Annotated[int, typer.Option(help="Encoder layers of the shape.")] = 4,
    vision_width: Annotated[int, typer.Option(help="Encoder width of the shape.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
    threads: Annotated[
        str,
        typer.Option(metavar="N,…", help="Also measure requests per second with so many threads."),
    ] = "",
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 16,
    seed: options.Seed = 0,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Time prefill, selection and decoding, with and without pruning, side by side in one run.

    "plain" is the same LLM on a text as long as the pruned prompt. Ratios are taken within a round,
    and the median over rounds is reported. The last line compares the largest tensor that pruning
    allocates with a full attention map, encoder heads × N × N.

    \b
    Examples:
      budwood bench prune-speed --out speed.json
      budwood bench prune-speed --shape llava-next --layers 4 --width 2048 --repeats 3
      budwood bench prune-speed --shape all --repeats 3 --new-tokens 4 --out shapes.json
      budwood bench prune-speed --threads 1,4,8 --repeats 3
    """
    if model and shape:
        raise InputError("give --model or --shape, not both")
    config = _config(options.listed(keep), method, repeats, new_tokens, seed)
    shapes = _shapes(shape, layers, width, vision_layers, vision_width)
    results = Results(out, force, json)
    counts = _counts(threads)
    record = _measure(config, shapes, (model, device, dtype), counts)
    alone = [row for row in record.rows if "threads" not in row]
    results.publish(record, COLUMNS, rows=alone, notes=[*_loads(record), *_targets(record)])


def _config(keeps: list[str], method: str, repeats: int, n_new: int, seed: int) -> SpeedConfig:
    from budwood.bench.prune.speed import SpeedConfig

    return SpeedConfig(tuple(map(options.keep_of, keeps)), method, repeats, n_new, seed)


def _shapes(names: str | None, *size: int) -> list[Shape]:
    from budwood.bench.prune.shapes import SHAPES, Shape

    if names is None:
        return []
    listed = list(SHAPES) if names == "all" else options.listed(names)
    if len(listed) == 1:
        return [Shape(listed[0], *size)]
    return [Shape.near(name, *size) for name in listed]


def _counts(threads: str) -> list[int]:
    """The numbers of threads."""
    names = options.listed(threads) if threads else []
    for name in names:
        if not name.isdigit() or int(name) < 1:
            raise InputError(
                f"threads={name!r} is not a number of threads; give numbers such as 1,4,8"
            )
    return list(map(int, names))


def _measure(
    config: SpeedConfig,
    shapes: list[Shape],
    source: tuple[str | None, str, str],
    threads: list[int],
) -> records.Record:
    from budwood.bench.prune.speed import measure

    rows, described = [], {}
    for shape in shapes or [None]:
        model, processor, inputs, name = _subject(config, shape, source)
        with working(f"timing {name}"):
            measured = measure(model, processor, inputs, config, threads)
        rows += [{"model": name, **row} for row in measured]
        described = {"dtype": str(model.dtype), "device": str(model.device)}
        del model, inputs
    described["dtype"] = described["dtype"].removeprefix("torch.")
    described |= {**dataclasses.asdict(config), "keeps": list(config.keeps)}
    described["shapes"] = list(map(dataclasses.asdict, shapes))
    return records.new_record("bench prune-speed", rows, seed=config.seed, config=described)


def _subject(
    config: SpeedConfig, shape: Shape | None, source: tuple[str | None, str, str]
) -> tuple[Any, Any, dict[str, Any], str]:
    """Model, processor (None for a shape), inputs of one row, and the model's name."""
    from budwood.cli.models import load, place

    if shape is not None:
        from budwood.bench.prune.shapes import random_model

        device, dtype = place(*source[1:])
        with working(f"building {shape.name} with random weights"):
            model, inputs = random_model(shape, config.seed, dtype, str(device))
        return model, None, inputs, shape.name

    from budwood.prune.chat import prepare
    from budwood.sprout.questions import ask
    from budwood.sprout.scenes import make_scene

    scene = make_scene(config.seed, "test")
    loaded = load(*source)
    question = ask(scene, "largest")[0].text
    inputs = prepare(loaded.processor, [scene.image], [question], loaded.model.device)
    return loaded.model, loaded.processor, inputs, loaded.name


def _loads(record: records.Record) -> list[str]:
    return [
        f"{row['model']}, {row['threads']} threads, {row['method']} {row['keep']}: "
        f"{row['requests_per_s']:.2f} requests/s, {row['requests_over_full']:.2f} × full"
        for row in record.rows
        if "threads" in row
    ]


def _targets(record: records.Record) -> list[str]:
    from budwood.bench.prune.speed import ATTACH_TARGET_MS, PREFILL_TARGET, SELECT_TARGET

    pruned = [row for row in record.rows if row.get("prefill_over_plain")]
    prefill = max(row["prefill_over_plain"] for row in pruned)
    selector = max(row["select_over_full"] for row in pruned)
    decode = min(row["decode_over_full"] for row in pruned)
    attach, detach = (
        max(row[name] for row in pruned if name in row) for name in ("attach_ms", "detach_ms")
    )
    return [
        f"prefill ÷ plain, at most: {prefill:.3f} (target {PREFILL_TARGET})",
        f"selector ÷ full prefill, at most: {selector:.2%} (target {SELECT_TARGET:.0%})",
        f"decoding speed ÷ full, at least: {decode:.3f} (target 1)",
        f"attach {attach:.3f} ms, detach {detach:.3f} ms, at most (target {ATTACH_TARGET_MS:.0f})",
        *(
            f"{row['model']}: largest tensor of saliency and selection {row['largest_numel']:,} "
            f"numbers, shape {tuple(row['largest_shape'])}; heads × N × N would be "
            f"{row['limit_numel']:,}"
            for row in pruned
            if "largest_numel" in row
        ),
    ]
