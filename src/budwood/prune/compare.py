"""One question answered with all visual tokens and with some of them, and the time of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from budwood.prune.chat import answers, check_question, prepare
from budwood.prune.latency import FirstToken, Timed, generate_timed
from budwood.prune.report import ImageReport
from budwood.prune.session import attach
from budwood.timing import side_by_side


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both answers.

    Attributes:
        answer_full: with all visual tokens.
        answer: with those that were kept.
        report: what was kept.
        first_full: time to the first token with all; medians.
        first: the same with those that were kept.
    """

    answer_full: str
    answer: str
    report: ImageReport
    first_full: FirstToken
    first: FirstToken


def compare(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    options: Mapping[str, Any],
    *,
    max_new_tokens: int = 32,
    repeats: int = 3,
    warm_up: bool = True,
) -> Comparison:
    """Answer a question about a picture with and without pruning, greedily and timed in turn.

    Args:
        model: a transformers model of a known family, with nothing attached.
        processor: its processor.
        image: RGB.
        question: what is asked.
        options: of ``attach``.
        max_new_tokens: where an answer is cut.
        repeats: timed runs of each; the answer comes from the last.
        warm_up: one more before them that is not timed.

    Raises:
        InputError: the question is empty.
    """
    inputs = prepare(processor, [image], [check_question(question)], model.device)
    found: dict[str, Any] = {}

    def full(_: int) -> FirstToken:
        found["full"] = generate_timed(model, inputs, max_new_tokens=max_new_tokens)
        return found["full"].first

    def pruned(_: int) -> FirstToken:
        with attach(model, processor=processor, timing=True, **options) as session:
            found["pruned"] = generate_timed(model, inputs, session, max_new_tokens=max_new_tokens)
        found["report"] = session.report[0]
        return found["pruned"].first

    times = side_by_side({"full": full, "pruned": pruned}, repeats, warm_up)
    n_prompt = inputs["input_ids"].shape[1]
    text = {name: _text(processor, found[name], n_prompt) for name in ("full", "pruned")}
    return Comparison(
        text["full"],
        text["pruned"],
        found["report"],
        FirstToken.median(times["full"]),
        FirstToken.median(times["pruned"]),
    )


def _text(processor: Any, timed: Timed, n_prompt: int) -> str:
    return answers(processor, timed.sequences, n_prompt)[0]
