"""One question answered with all visual tokens and with a few, by one method or by several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from budwood.errors import InputError
from budwood.prune.chat import GREEDY, answers, check_question, prepare
from budwood.prune.encoded import Encoded, encode
from budwood.prune.latency import FirstToken, generate_timed
from budwood.prune.report import ImageReport
from budwood.prune.selection import resolve_method
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


@dataclass(frozen=True, eq=False)
class MethodAnswer:
    """What the model answers when one method chooses its visual tokens.

    Attributes:
        method: its name.
        answer: the answer.
        report: what was kept.
    """

    method: str
    answer: str
    report: ImageReport


def compare_methods(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    methods: Sequence[str],
    options: Mapping[str, Any],
    *,
    max_new_tokens: int = 32,
) -> tuple[str, list[MethodAnswer]]:
    """Answer a question with all visual tokens, then with those that each method keeps.

    The picture is encoded once for all methods that read it in the same form. Answers are greedy.

    Args:
        model: a transformers model of a known family, with nothing attached.
        processor: its processor.
        image: RGB.
        question: what is asked.
        methods: names in ``METHODS``, also with parameters.
        options: of ``attach``, without ``method`` and ``encoded``.
        max_new_tokens: where an answer is cut.

    Returns:
        The answer with all tokens, and one entry per method in their order.

    Raises:
        InputError: the question is empty, no method is given, one is given twice, or ``methods``
            is a single string.
        UnknownNameError: an unknown method.
    """
    if isinstance(methods, str):
        raise InputError(f"methods={methods!r} is a string; give a list of names")
    if not methods:
        raise InputError("nothing to compare: give at least one method")
    if len(set(methods)) < len(methods):
        raise InputError(f"methods has one twice: {', '.join(methods)}")
    forms = {method: resolve_method(method).whole_crops for method in methods}
    inputs = prepare(processor, [image], [check_question(question)], model.device)
    n_prompt = inputs["input_ids"].shape[1]
    generation: dict[str, Any] = {**GREEDY, "max_new_tokens": max_new_tokens}
    full = answers(processor, model.generate(**inputs, **generation), n_prompt)[0]
    encoded: dict[bool, Encoded] = {}
    compared = []
    for method, form in forms.items():
        if form not in encoded:
            encoded[form] = encode(model, inputs, method)
        given = {**options, "method": method, "encoded": encoded[form]}
        with attach(model, processor=processor, **given) as session:
            output = model.generate(**inputs, **generation)
        answer = answers(processor, output, n_prompt)[0]
        compared.append(MethodAnswer(method, answer, session.report[0]))
    return full, compared
