"""One question answered with all visual tokens and with a few, and the time of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from budwood.prune.chat import answers, check_question, prepare
from budwood.prune.latency import FirstToken, generate_timed
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
        first: time to the first token with those that were kept; medians.
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
        repeats: timed runs of each; the answers come from the last.
        warm_up: run each once more before them, without timing it.

    Raises:
        InputError: the question is empty.
    """
    inputs = prepare(processor, [image], [check_question(question)], model.device)
    n_prompt = inputs["input_ids"].shape[1]
    texts: dict[str, str] = {}
    reports: list[ImageReport] = []

    def full(_: int) -> FirstToken:
        timed = generate_timed(model, inputs, max_new_tokens=max_new_tokens)
        texts["full"] = answers(processor, timed.sequences, n_prompt)[0]
        return timed.first

    def pruned(_: int) -> FirstToken:
        with attach(model, processor=processor, timing=True, **options) as session:
            timed = generate_timed(model, inputs, session, max_new_tokens=max_new_tokens)
        texts["pruned"] = answers(processor, timed.sequences, n_prompt)[0]
        reports[:] = session.report
        return timed.first

    times = side_by_side({"full": full, "pruned": pruned}, repeats, warm_up)
    return Comparison(
        texts["full"],
        texts["pruned"],
        reports[0],
        FirstToken.median(times["full"]),
        FirstToken.median(times["pruned"]),
    )
