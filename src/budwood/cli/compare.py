"""`budwood compare`: one question about a picture, with the tokens that several methods keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import print_json, print_table, say, warnings_said, working
from budwood.cli.output import reserve_picture
from budwood.errors import InputError
from budwood.files import write_whole
from budwood.loading import EMBEDDED_VLMS, check_source
from budwood.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

    from budwood.prune.compare import MethodAnswer

COLUMNS = Columns(
    Column("method"),
    Column("n_kept", heading="visual tokens"),
    Column("answer"),
)


def compare(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture: PNG, JPEG, WebP, ….")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    methods: options.Methods = "adav+,adav,scope,fastervlm,random,uniform",
    keep: options.Keep = "64",
    picture: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Save a picture of what each method kept."),
    ] = None,
    model: options.Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    span: options.Question = "current",
    positions: options.Positions = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Answer a question about a picture with the visual tokens that each of several methods keeps.

    `budwood ls methods` lists the methods.

    \b
    Example:
      budwood compare photo.jpg "What is on the table?" --keep 0.05 --out compared.png
    """
    check_source(model, *EMBEDDED_VLMS)
    if picture:
        reserve_picture(picture, force, [image])
    names = options.listed(methods)
    if not names:
        raise InputError(f"--methods is {methods!r}; give at least one of `budwood ls methods`")
    shown = read_picture(image)
    attached = {
        "keep": options.keep_of(keep),
        "question": span,
        "seed": seed,
        "positions": positions,
    }
    from budwood.prune.compare import n_unpruned

    full, compared, name = _compared(
        shown, question, names, attached, (model, device, dtype), max_new_tokens
    )
    if picture:
        sheet = drawn(shown, question, full, compared)
        write_whole(picture, lambda part: sheet.save(part))
        say(f"wrote {picture}")
    rows = [_row(one) for one in compared]
    if all(one.report.kept_all for one in compared):
        say(f"the picture has {n_unpruned(compared)} candidates, so all were kept")
    if json:
        described = {"model": name, "image": str(image), "question": question}
        settings = {name: value for name, value in attached.items() if name != "question"}
        settings["question_span"] = span
        results = {"answer_full": full, "methods": rows}
        print_json(described | settings | results | {"out": str(picture) if picture else None})
    else:
        everything = {"method": "all tokens", "n_kept": n_unpruned(compared), "answer": full}
        print_table([everything, *rows], COLUMNS)


def drawn(
    picture: Image.Image, question: str, full: str, compared: list[MethodAnswer]
) -> Image.Image:
    """Draw what each method kept, with its answer below."""
    from budwood.prune.overlay import draw_methods

    with warnings_said("the picture shows boxes "):
        return draw_methods(
            picture,
            {one.method: one.report for one in compared},
            {one.method: f"answer: {one.answer}" for one in compared},
            [question, f"all tokens: {full}"],
        )


def _compared(
    picture: Image.Image,
    question: str,
    names: list[str],
    attached: dict[str, Any],
    source: tuple[str | None, str, str],
    max_new_tokens: int,
) -> tuple[str, list[MethodAnswer], str]:
    from budwood.cli.models import load
    from budwood.prune.chat import check_question
    from budwood.prune.compare import check_methods, compare_methods

    check_question(question)
    check_methods(names)
    loaded = load(*source)
    with working("answering"):
        full, compared = compare_methods(
            loaded.model,
            loaded.processor,
            picture,
            question,
            names,
            attached,
            max_new_tokens=max_new_tokens,
        )
    return full, compared, loaded.name


def _row(one: MethodAnswer) -> dict[str, Any]:
    report = one.report
    return {
        "method": one.method,
        "n_visual": report.n_before,
        "n_kept": report.n_after,
        "n_fixed": report.n_fixed,
        "answer": one.answer,
        "kept": report.kept.tolist(),
    }
