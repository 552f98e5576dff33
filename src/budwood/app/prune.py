"""The Prune tab: a question about a picture, answered with all visual tokens and with a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import catalogue
from budwood.app import markup
from budwood.app.models import Models
from budwood.app.uploads import uploaded
from budwood.errors import InputError
from budwood.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

    from budwood.prune.compare import Comparison
    from budwood.prune.report import ImageReport

EXAMPLES = {
    **{f"Large scene {i}": (5047 + i, True) for i in range(1, 5)},
    **{f"Small scene {i}": (5047 + i, False) for i in range(1, 5)},
}
"""Names of held-out scenes: their seed, and whether they have high resolution."""
START = next(iter(EXAMPLES))
METHODS = tuple(catalogue.PRUNING_METHODS)
SIDE_BY_SIDE = ("adav+", "adav", "scope", "fastervlm", "random", "uniform")
PERCENT = 10.0
"""Of the visual tokens, kept at the start."""
MAX_NEW_TOKENS = 32
LAYERS = {
    "kept": "Kept tokens: what the language model sees is bright.",
    "saliency": "Saliency: what the vision encoder attends to. Bright is high.",
    "relevance": "Relevance: what is near to the question's words. Bright is high.",
}
OVERLAPPING = " Large squares are tokens of the overview, small ones are tokens of its crops."


@dataclass(frozen=True)
class Answered:
    """What the tab shows of one question.

    Attributes:
        summary: HTML: both answers, tokens and times.
        layers: name of a layer → HTML of its picture.
    """

    summary: str
    layers: dict[str, str]


def summary(method: str) -> str:
    """What a method does, in one sentence."""
    return catalogue.PRUNING_METHODS[method].summary


def example(name: str) -> tuple[Image.Image, str]:
    """A held-out scene, and a question about one of its small objects.

    Args:
        name: one of ``EXAMPLES``.

    Raises:
        InputError: there is no such example.
    """
    from budwood.sprout.questions import ask
    from budwood.sprout.scenes import make_scene

    if name not in EXAMPLES:
        raise InputError(f"there is no example {name!r}; choose one of {', '.join(EXAMPLES)}")
    seed, high_resolution = EXAMPLES[name]
    scene = make_scene(seed, "test", high_resolution)
    asked = [q for q in ask(scene) if q.boxes and not q.asks_salient]
    preferred = [q for q in asked if q.kind == "colour"] or asked
    return scene.image, preferred[-1].text


def answer(
    models: Models, picture: str | None, question: str, method: str, percent: float
) -> Answered:
    """Answer a question with all visual tokens and with the kept ones, timed in turn.

    Args:
        models: of the page.
        picture: the uploaded file.
        question: what is asked.
        method: one of ``METHODS``.
        percent: of the visual tokens, to keep.

    Raises:
        BudwoodError: there is no picture, it cannot be read, or the question is empty.
    """
    from budwood.prune.chat import check_question

    shown, asked = _picture(picture), check_question(question)
    warm = models.vlm.is_made
    with models.vlm.held() as loaded:
        from budwood.prune.compare import compare

        compared = compare(
            loaded.model,
            loaded.processor,
            shown,
            asked,
            _options(method, percent),
            max_new_tokens=MAX_NEW_TOKENS,
            repeats=1,
            warm_up=not warm,
        )
    return Answered(_summary(compared, method), _layers(shown, compared.report, method))


def side_by_side(
    models: Models, picture: str | None, question: str, methods: Sequence[str], percent: float
) -> str:
    """Answer a question with the tokens that each of several methods keeps.

    Args:
        models: of the page.
        picture: the uploaded file.
        question: what is asked.
        methods: some of ``METHODS``.
        percent: of the visual tokens, to keep.

    Returns:
        HTML: the answer with all tokens, then a picture and an answer per method.

    Raises:
        BudwoodError: as of :func:`answer`, or there is no method.
    """
    from budwood.prune.chat import check_question

    shown, asked = _picture(picture), check_question(question)
    if not methods:
        raise InputError("nothing to compare: choose at least one method")
    with models.vlm.held() as loaded:
        from budwood.prune.compare import compare_methods, n_unpruned

        options = _options(None, percent)
        full, compared = compare_methods(
            loaded.model,
            loaded.processor,
            shown,
            asked,
            list(methods),
            options,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    figures = [
        _kept(shown, one.report, one.method, f"{one.method}: {one.answer}") for one in compared
    ]
    first = markup.paragraph(f"All {n_unpruned(compared)} visual tokens: {full}")
    return markup.status(first + markup.grid(figures))


def _picture(file: str | None) -> Image.Image:
    if file is None:
        raise InputError("there is no picture; choose an example, or upload one")
    with uploaded(file):
        return read_picture(Path(file))


def _options(method: str | None, percent: float) -> dict[str, Any]:
    named = {} if method is None else {"method": method}
    return {**named, "keep": percent / 100, "seed": 0}


def _summary(compared: Comparison, method: str) -> str:
    report = compared.report
    rows = [
        ("all tokens", compared.answer_full, report.n_unpruned, compared.first_full),
        (method, compared.answer, report.n_after, compared.first),
    ]
    heads = ("from", "answer", "visual tokens", "first token, ms", "encoder", "selection", "LLM")
    cells = [
        (
            name,
            said,
            f"{n_tokens:,}",
            f"{first.total_ms:,.0f}",
            f"{first.encode_ms:,.0f}",
            f"{first.select_ms:,.0f}",
            f"{first.prefill_ms:,.0f}",
        )
        for name, said, n_tokens, first in rows
    ]
    note = f"and {report.n_fixed} fixed tokens, such as newlines, in both" if report.n_fixed else ""
    shown = markup.table("Answers, and time to the first token", heads, cells)
    return markup.status(shown + (markup.paragraph(note) if note else ""))


def _layers(shown: Image.Image, report: ImageReport, method: str) -> dict[str, str]:
    from budwood.prune.overlay import layers

    counted = f"{report.n_after} of {report.n_before} visual tokens"
    below = LAYERS | {"kept": LAYERS["kept"] + (OVERLAPPING if _overlaps(report) else "")}
    return {
        name: markup.picture(
            drawn, f"The picture with the layer {name}, {method}, {counted}", below[name]
        )
        for name, drawn in layers(shown, report).items()
    }


def _overlaps(report: ImageReport) -> bool:
    """Whether the model sees the picture more than once, as an overview and as crops."""
    widths, heights = (report.boxes[:, 2:] - report.boxes[:, :2]).unbind(-1)
    return float((widths * heights).sum()) > 1.1


def _kept(shown: Image.Image, report: ImageReport, method: str, caption: str) -> str:
    from budwood.prune.overlay import layers

    counted = f"{report.n_after} of {report.n_before} visual tokens"
    return markup.picture(
        layers(shown, report)["kept"],
        f"The picture with the {counted} that {method} keeps",
        caption,
    )
