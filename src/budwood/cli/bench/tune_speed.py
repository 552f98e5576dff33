"""`budwood bench tune-speed`: what SLIM costs beside a plain LoRA of equal rank."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood import records
from budwood.cli import options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import progress
from budwood.cli.results import Results

if TYPE_CHECKING:
    from budwood.bench.tune.speed import SpeedConfig

COLUMNS = Columns(
    Column("method"),
    Column("width"),
    Column("n_tokens", heading="tokens"),
    Column("ms", ".2f", "forward and backward ms"),
    Column("over_lora", ".3f", "÷ LoRA"),
    Column("over_frozen", ".3f", "÷ frozen"),
    Column("peak_mib", ".1f", "peak MiB"),
    Column("memory_over_lora", ".3f", "÷ LoRA's"),
    Column("bypassed_share", ".0%", "bypassed"),
    Column("decode_ms", ".2f", "ms a token"),
    Column("decode_over_lora", ".3f", "÷ LoRA"),
)


def bench_tune_speed(
    widths: Annotated[str, typer.Option(metavar="N,…", help="Model widths.")] = "576,2048,4096",
    tokens: Annotated[str, typer.Option(metavar="N,…", help="Tokens a batch.")] = "256,1024,4096",
    methods: Annotated[
        str, typer.Option(metavar="NAME,…", help="frozen and lora, and any of slim, loop, bypass.")
    ] = "frozen,lora,slim,loop,bypass",
    rank: Annotated[int, typer.Option(help="Rank of each expert.")] = 16,
    distance: Annotated[
        str, typer.Option(help="discriminant, whitened, rms or max.")
    ] = "discriminant",
    decode: Annotated[
        bool, typer.Option(help="Time generation with a KV cache too, by a 4-layer Llama.")
    ] = True,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of weights and inputs.")] = 0,
    device: options.Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16, of the frozen weights.")
    ] = "float32",
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Time SLIM, LoRA and others side by side: a training step of one gated MLP, and generation.

    The LoRA has the rank of all of SLIM's experts together. "loop" is routed experts as a loop,
    without distance, statistics and masks; "bypass" is SLIM on a batch whose tokens all go to
    identity experts. Gathering and committing statistics is included. Ratios are taken within a
    round; medians are reported.

    \b
    Example:
      budwood bench tune-speed --widths 576,2048 --tokens 1024 --out speed.json
    """
    _quieten_profiler()
    from budwood.bench.tune.speed import SpeedConfig
    from budwood.cli.models import place

    config = SpeedConfig(
        widths=options.counts_of(widths, "widths"),
        n_tokens=options.counts_of(tokens, "tokens"),
        methods=tuple(options.listed(methods)),
        repeats=repeats,
        r=rank,
        distance=distance,
        dtype=dtype,
        device=str(place(device, dtype)[0]),
        seed=seed,
        decode=decode,
    )
    results = Results(out, force, json)
    record = _measure(config)
    results.publish(record, COLUMNS, notes=_targets(record.rows))


def _quieten_profiler() -> None:
    """PyTorch's, which counts memory, writes lines of its own; to be called before its import."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _measure(config: SpeedConfig) -> records.Record:
    from budwood.bench.tune.speed import measure_speed

    with progress("timing") as bar:
        rows = measure_speed(config, bar)
    described: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return records.new_record("bench tune-speed", rows, seed=config.seed, config=described)


def _targets(rows: list[records.Row]) -> list[str]:
    from budwood.bench.tune.speed import TARGETS, ratios_with_targets

    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in ratios_with_targets(row).items():
            found.setdefault(name, []).append(value)
    return [
        f"{name.replace('_', ' ').replace('over', '÷')}, at most: {max(found[name]):.3f} "
        f"(target {target:.2f})"
        for name, target in TARGETS.items()
        if name in found
    ]
