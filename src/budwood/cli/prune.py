"""`budwood prune`: one question about a picture, answered with all visual tokens and with a few."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import out, print_json, print_table, say, warnings_said, working
from budwood.cli.output import reserve_picture
from budwood.files import write_whole
from budwood.loading import EMBEDDED_VLMS, check_source
from budwood.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

    from budwood.prune.compare import Comparison

COLUMNS = Columns(
    Column(""),
    Column("n_visual", heading="candidates"),
    Column("n_fixed", heading="fixed"),
    Column("answer"),
    Column("total_ms", ".0f", "first token ms"),
    Column("encode_ms", ".0f", "encoder"),
    Column("select_ms", ".0f", "selection"),
    Column("prefill_ms", ".0f", "LLM"),
)


def prune(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture: PNG, JPEG, WebP, ….")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    model: options.Model = None,
    keep: options.Keep = "64",
    method: options.MethodOrBest = None,
    overlay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save a picture of what was kept.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    span: options.Question = "current",
    positions: options.Positions = None,
    compat: options.Compat = None,
    seed: options.Seed = 0,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed runs; the times shown are medians.")
    ] = 1,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Answer a question about a picture with all visual tokens and with the kept ones.

    --keep counts candidates: visual tokens of all crops together. Fixed ones, such as newlines,
    come on top.

    Prints both answers and the time to the first token, after one warm-up. For times to rely on,
    give --repeats 5. Pictures of more than 50 million pixels, or more than 100 times as long as
    wide, are refused.

    \b
    Examples:
      budwood prune photo.jpg "What is on the table?" --keep 0.1 --overlay kept.png
      budwood prune photo.jpg "What is on the table?" --model llava-hf/llava-1.5-7b-hf --keep 64
    """
    check_source(model, *EMBEDDED_VLMS)
    if overlay:
        reserve_picture(overlay, force, [image])
    picture = read_picture(image)
    attached = _attach_options(keep, method, compat, span, seed, positions)
    comparison, name = _compare(
        picture, question, (model, device, dtype), max_new_tokens, repeats, attached
    )
    if comparison.report.kept_all:
        say(f"the picture has {comparison.report.n_before} candidates, so all were kept")
    if overlay:
        write_whole(overlay, lambda part: drawn(picture, question, comparison).save(part))
        say(f"wrote {overlay}")
    if json:
        described = {"model": name, "image": str(image), "question": question}
        print_json(described | _as_dict(comparison, attached, overlay))
    else:
        _print(comparison)


def drawn(picture: Image.Image, question: str, comparison: Comparison) -> Image.Image:
    """Draw what was kept, with the question and both answers above."""
    from budwood.prune.overlay import draw

    caption = [
        question,
        f"all tokens: {comparison.answer_full} · kept tokens: {comparison.answer}",
        _split_line(comparison),
    ]
    with warnings_said("the picture shows boxes "):
        return draw(picture, comparison.report, caption)


def _attach_options(
    keep: str, method: str | None, compat: str | None, span: str, seed: int, positions: str | None
) -> dict[str, Any]:
    from budwood.prune.selection import published_form

    if compat:
        method = published_form(method or "adav")
    return {
        "method": method or options.BEST_METHOD,
        "question": span,
        "keep": options.keep_of(keep),
        "seed": seed,
        "positions": positions,
    }


def _compare(
    picture: Image.Image,
    question: str,
    source: tuple[str | None, str, str],
    max_new_tokens: int,
    repeats: int,
    attached: dict[str, Any],
) -> tuple[Comparison, str]:
    from budwood.cli.models import load
    from budwood.prune.chat import check_question
    from budwood.prune.compare import check_methods, compare

    check_question(question)
    check_methods([attached["method"]])
    loaded = load(*source)
    with working("answering"):
        comparison = compare(
            loaded.model,
            loaded.processor,
            picture,
            question,
            attached,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
        )
    return comparison, loaded.name


def _as_dict(
    comparison: Comparison, attached: dict[str, Any], overlay: Path | None
) -> dict[str, Any]:
    report = comparison.report
    return {
        "answer": comparison.answer,
        "answer_full": comparison.answer_full,
        **{name: value for name, value in attached.items() if name != "question"},
        "question_span": attached["question"],
        "n_candidates": report.n_before,
        "n_visual": report.n_before,
        "n_kept": report.n_after,
        "n_fixed": report.n_fixed,
        "split": _split(comparison),
        "kept": report.kept.tolist(),
        "ttft": comparison.first.as_dict(),
        "ttft_full": comparison.first_full.as_dict(),
        "overlay": str(overlay) if overlay else None,
    }


def _print(comparison: Comparison) -> None:
    report = comparison.report
    full = {"": "all tokens", "answer": comparison.answer_full, "n_visual": report.n_unpruned}
    kept = {"": "kept tokens", "answer": comparison.answer, "n_visual": report.n_after}
    fixed = {"n_fixed": report.n_fixed}
    rows = [
        full | fixed | comparison.first_full.as_dict(),
        kept | fixed | comparison.first.as_dict(),
    ]
    print_table(rows, COLUMNS)
    out().print(_split_line(comparison), markup=False)


def _split_line(comparison: Comparison) -> str:
    report, split = comparison.report, _split(comparison)
    line = f"kept {report.n_after} of {report.n_before} candidates, {report.n_fixed} fixed"
    if split is None:
        return line
    return (
        f"{line}: {split['reserved']} reserved, {split['by_text']} by text, "
        f"{split['by_saliency']} by saliency"
    )


def _split(comparison: Comparison) -> dict[str, int] | None:
    """How the budget was divided; None for a method that does not divide it."""
    split = comparison.report.split
    counts = {name: getattr(split, name) for name in ("reserved", "by_text", "by_saliency")}
    return counts if any(counts.values()) else None
