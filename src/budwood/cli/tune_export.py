"""`budwood tune export-lora`: an ordinary LoRA that comes near a SLIM adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import options, tune_options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import print_json, print_table, say, working
from budwood.errors import InputError
from budwood.files import need_parent
from budwood.loading import SMOLLM2, check_adapter_source, check_source

if TYPE_CHECKING:
    from budwood.loading import Loaded
    from budwood.tune.data.encoding import EncodedExample
    from budwood.tune.data.examples import Example

COLUMNS = Columns(
    Column("model"),
    Column("loss", ".4f", "loss a token"),
)
_BATCH = 8


def export_lora(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a SLIM adapter.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the LoRA.")],
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE|ID", help="Examples that the routing weights are averaged over."
        ),
    ],
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ID", help="Examples to measure the loss on; by default the same."
        ),
    ] = None,
    model: tune_options.Base = None,
    rank: Annotated[
        int, typer.Option(help="Rank of the LoRA; 0: that of all experts together.")
    ] = 0,
    limit: Annotated[int, typer.Option(help="Examples per file, drawn at random.")] = 256,
    style: tune_options.Style = "cloze",
    max_length: Annotated[
        int, typer.Option(help="Longest example in tokens; longer ones are left out.")
    ] = 512,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Write an ordinary PEFT LoRA that approximates a SLIM adapter, for tools without SLIM.

    Routing weights are fixed to their averages, so no token bypasses the LoRA: expect it to forget
    more. The losses of base, SLIM and LoRA are measured and written beside it.

    \b
    Example:
      budwood tune export-lora tuned --output lora --calibration train.jsonl
    """
    check_adapter_source(adapter)
    check_source(model, SMOLLM2)

    from budwood.tune.data.examples import check_first_row, read_examples

    for source in filter(None, (calibration, held_out)):
        check_first_row(source, style)

    from budwood.checks import need_at_least
    from budwood.cli.models import load_adapted
    from budwood.tune.evaluate.tasks import draw
    from budwood.tune.slim.export import empty_folder
    from budwood.tune.slim.keeper import is_slim

    need_at_least(1, limit=limit, max_length=max_length)
    need_at_least(0, rank=rank)
    need_parent(output)
    empty_folder(output)  # refuses other places, before a model is loaded
    examples = {
        name: draw(read_examples(source, style), limit, seed)
        for name, source in (("calibration", calibration), ("held_out", held_out))
        if source
    }
    loaded = load_adapted(adapter, model, device, dtype)
    if not is_slim(loaded.model):
        raise InputError(
            f"{adapter} is not a SLIM adapter; PEFT can merge or convert others itself"
        )
    found = _export(loaded, examples, output, rank, max_length)
    if json:
        print_json(found)
        return
    names = {"loss_base": "base", "loss_slim": "SLIM", "loss_lora": "LoRA, approximate"}
    print_table([{"model": text, "loss": found[key]} for key, text in names.items()], COLUMNS)
    say(f"a LoRA of rank {found['rank']} is in {output}; it approximates {adapter}")


def _export(
    loaded: Loaded,
    examples: dict[str, list[Example]],
    output: Path,
    rank: int,
    max_length: int,
) -> dict[str, Any]:
    from budwood.tune import export_lora as write_lora
    from budwood.tune.data.encoding import encode, longest_for

    longest = longest_for(loaded.model, max_length)
    batches = {}
    for name, some in examples.items():
        encoded = encode(some, loaded.tokenizer, longest)
        if encoded.note:
            say(encoded.note)
        if encoded.n_too_long:
            n_out = encoded.n_too_long
            say(f"left out {n_out} of {len(some)} examples of more than {longest} tokens")
        batches[name] = _batches(encoded.rows, loaded)
    with working("averaging and measuring"):
        report = write_lora(
            loaded.model,
            batches["calibration"],
            output,
            held_out=batches.get("held_out"),
            rank=rank or None,
        )
    return dataclasses.asdict(report)


def _batches(rows: list[EncodedExample], loaded: Loaded) -> list[dict[str, Any]]:
    from budwood.tune.data.batches import Padded, on_device

    collate = Padded.of(loaded.model, loaded.tokenizer, trim=False)
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [
        on_device(collate(ordered[i : i + _BATCH]), loaded.model.device)
        for i in range(0, len(ordered), _BATCH)
    ]
