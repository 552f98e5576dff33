"""`budwood prune`: one picture, one question, all visual tokens and a few."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import options
from budwood.cli.console import out, print_json, print_table, say, working
from budwood.cli.output import reserve_picture
from budwood.cli.pictures import read_picture
from budwood.files import write_whole

if TYPE_CHECKING:
    from PIL import Image

    from budwood.prune.compare import Comparison

_COLUMNS = {
    "": ("", ""),
    "answer": ("answer", ""),
    "n_visual": ("visual tokens", ""),
    "total_ms": ("first token ms", ".1f"),
    "encode_ms": ("encoder", ".1f"),
    "select_ms": ("selector", ".1f"),
    "prefill_ms": ("prefill", ".1f"),
}


def prune(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture: PNG, JPEG, WebP, ….")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    model: options.Model = None,
    keep: Annotated[
        str, typer.Option(metavar="N|RATIO", help="Visual tokens to keep: a count, or a ratio.")
    ] = "64",
    method: Annotated[str, typer.Option(help="One of `budwood ls methods`.")] = "adav",
    overlay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what was kept.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 32,
    span: Annotated[
        str,
        typer.Option("--question", metavar="all|turn", help="Which text counts as the question."),
    ] = "all",
    compat: options.Compat = None,
    seed: Annotated[int, typer.Option(help="Of methods that draw.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 3,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Answer a question about a picture with all visual tokens and with the kept ones.

    The time to the first token is the median of a few runs, taken in turn after a warm-up. Pictures
    of more than 50 million pixels, or more than 100 times as long as wide, are refused.

    \b
    Examples:
      budwood prune photo.jpg "What is on the table?" --keep 0.1 --overlay kept.png
      budwood prune photo.jpg "What is on the table?" --model llava-hf/llava-1.5-7b-hf --keep 64
    """
    chosen = _checked(keep, method, compat, span) | {"seed": seed}
    if overlay:
        reserve_picture(overlay, force)
    picture = read_picture(image)
    found, name = _compare(
        picture, question, (model, device, dtype), max_new_tokens, repeats, chosen
    )
    if found.report.kept_all:
        say(f"the picture has {found.report.n_before} visual tokens, so all were kept")
    if overlay:
        write_whole(overlay, lambda part: drawn(picture, question, found).save(part))
        say(f"wrote {overlay}")
    if json:
        described = {"model": name, "image": str(image), "question": question}
        print_json(described | _as_dict(found, chosen, overlay))
    else:
        _print(found)


def drawn(picture: Image.Image, question: str, found: Comparison) -> Image.Image:
    """The overlay of a comparison."""
    from budwood.prune.overlay import draw

    caption = [
        question,
        f"all tokens: {found.answer_full} · kept tokens: {found.answer}",
        _split_line(found),
    ]
    return draw(picture, found.report, caption)


def _checked(keep: str, method: str, compat: str | None, span: str) -> dict[str, Any]:
    """Options of ``attach``; what is wrong with them shows before the model is loaded."""
    from budwood.prune.question import Question
    from budwood.prune.selection import resolve_method

    resolve_method(method, compat)
    Question(span)
    return {"method": method, "compat": compat, "question": span, "keep": options.keep_of(keep)}


def _compare(
    picture: Image.Image,
    question: str,
    source: tuple[str | None, str, str],
    max_new_tokens: int,
    repeats: int,
    chosen: dict[str, Any],
) -> tuple[Comparison, str]:
    from budwood.cli.models import load
    from budwood.prune.chat import check_question
    from budwood.prune.compare import compare

    check_question(question)
    loaded = load(*source)
    with working("answering"):
        found = compare(
            loaded.model,
            loaded.processor,
            picture,
            question,
            chosen,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
        )
    return found, loaded.name


def _as_dict(found: Comparison, chosen: dict[str, Any], overlay: Path | None) -> dict[str, Any]:
    report, split = found.report, found.report.split
    return {
        "answer": found.answer,
        "answer_full": found.answer_full,
        **{name: value for name, value in chosen.items() if name != "question"},
        "question_span": chosen["question"],
        "n_visual": report.n_before,
        "n_kept": report.n_after,
        "n_fixed": report.n_fixed,
        "split": {
            "reserved": split.reserved,
            "by_text": split.by_text,
            "by_saliency": split.by_saliency,
        },
        "kept": report.kept.tolist(),
        "ttft": found.first.as_dict(),
        "ttft_full": found.first_full.as_dict(),
        "overlay": str(overlay) if overlay else None,
    }


def _print(found: Comparison) -> None:
    report = found.report
    full = {"": "all tokens", "answer": found.answer_full, "n_visual": report.n_before}
    kept = {"": "kept tokens", "answer": found.answer, "n_visual": report.n_after}
    print_table([full | found.first_full.as_dict(), kept | found.first.as_dict()], _COLUMNS)
    out().print(_split_line(found), markup=False)


def _split_line(found: Comparison) -> str:
    report, split = found.report, found.report.split
    fixed = f", and {report.n_fixed} that always stay" if report.n_fixed else ""
    line = f"kept {report.n_after} of {report.n_before} visual tokens{fixed}"
    if not split.reserved + split.by_text + split.by_saliency:
        return line
    return (
        f"{line}: {split.reserved} reserved, {split.by_text} by text, "
        f"{split.by_saliency} by saliency"
    )
