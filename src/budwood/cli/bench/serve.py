"""`budwood bench serve`: requests a second and latency of running servers."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from budwood import records
from budwood.cli import options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import working
from budwood.cli.results import Results

COLUMNS = Columns(
    Column("server"),
    Column("pictures"),
    Column("questions"),
    Column("concurrency", heading="at once"),
    Column("requests_per_s", ".2f", "requests/s"),
    Column("first_token_ms", ".0f", "first token ms"),
    Column("total_ms", ".0f", "answer ms"),
    Column("slow_ms", ".0f", "95 % within ms"),
    Column("n_prompt", heading="prompt"),
)


def bench_serve(
    server: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=URL...", help="Running servers, such as full=http://127.0.0.1:8000."
        ),
    ],
    concurrency: Annotated[
        str, typer.Option(metavar="N,…", help="Requests under way at the same time.")
    ] = "1,4,16",
    pictures: Annotated[
        str, typer.Option(metavar="same,many", help="same: one for all; many: different ones.")
    ] = "same,many",
    questions: Annotated[
        str, typer.Option(metavar="same,many", help="same: one for all; many: different ones.")
    ] = "same,many",
    requests: Annotated[
        int, typer.Option(help="Requests in each row; at least as many as run at once.")
    ] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 16,
    side: Annotated[int, typer.Option(help="Width and height of a picture in pixels.")] = 336,
    seed: options.Seed = 0,
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Time requests about pictures on servers that run, with and without pruning, side by side.

    \b
    Examples:
      budwood bench serve full=http://127.0.0.1:8000 pruned=http://127.0.0.1:8001 --out serve.json
      budwood bench serve pruned=http://127.0.0.1:8001 --concurrency 1 --pictures same --requests 8
    """
    from budwood.bench.serve import ServeConfig, Server, measure

    servers = [Server.parse(text) for text in server]
    config = ServeConfig(
        options.counts_of(concurrency, "concurrency"),
        tuple(options.listed(pictures)),
        tuple(options.listed(questions)),
        requests,
        new_tokens,
        side,
        seed,
    )
    results = Results(out, force, json)
    with working("sending requests"):
        rows = measure(servers, config)
    described = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    results.publish(records.new_record("bench serve", rows, seed=seed, config=described), COLUMNS)
