"""One question answered with all visual tokens and with a few, by one method or by several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.prune.chat import GREEDY, answers, check_question, prepare
from budwood.prune.encoded import Encoded, encode
from budwood.prune.latency import FirstToken, generate_timed
from budwood.prune.methods.base import Method
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
        InputError: the question is empty, or longer with the picture than the model's context.
    """
    need_at_least(1, repeats=repeats)
    inputs = _asked(model, processor, image, question, max_new_tokens)
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
        InputError: the question is empty, or longer with the picture than the model's context; no
            method is given, or one twice, also spelled differently; or ``methods`` is a string.
        UnknownNameError: an unknown method.
    """
    check_methods(methods)
    ways = [{**options, "method": method} for method in methods]
    return compare_ways(model, processor, image, question, ways, max_new_tokens=max_new_tokens)


def n_unpruned(compared: Sequence[MethodAnswer]) -> int:
    """Visual tokens that the LLM sees without pruning, beside fixed ones such as newlines.

    The reports of most methods agree; that of ``adav-official`` counts newlines as well.
    """
    return min(one.report.n_unpruned for one in compared)


def check_methods(methods: Sequence[str]) -> None:
    """Refuse a string, and methods that are unknown or given twice.

    Raises:
        InputError: see :func:`compare_methods`.
        UnknownNameError: likewise.
    """
    if isinstance(methods, str):
        raise InputError(f"methods={methods!r} is a string; give a list of names")
    seen: dict[Method, str] = {}
    for method in methods:
        chosen = resolve_method(method)
        if chosen in seen:
            same = f", also as {seen[chosen]}" if seen[chosen] != method else ""
            raise InputError(f"{method} is given twice{same}; give each method once")
        seen[chosen] = method


def compare_ways(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    ways: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 32,
) -> tuple[str, list[MethodAnswer]]:
    """Answer a question with all visual tokens, then in each of some ways to prune.

    The picture is encoded once for all methods that read it in the same form. Answers are greedy.

    Args:
        model: as in :func:`compare_methods`, and so are the other arguments.
        processor: its processor.
        image: RGB.
        question: what is asked.
        ways: options of ``attach`` for each, with ``method`` and without ``encoded``.
        max_new_tokens: where an answer is cut.

    Returns:
        The answer with all tokens, and one entry per way in their order.

    Raises:
        InputError: the question is empty, or longer with the picture than the model's context; or
            there is no way.
    """
    if not ways:
        raise InputError("nothing to compare: give at least one method")
    inputs = _asked(model, processor, image, question, max_new_tokens)
    n_prompt = inputs["input_ids"].shape[1]
    generation: dict[str, Any] = {**GREEDY, "max_new_tokens": max_new_tokens}
    encoded: dict[bool, Encoded] = {}
    compared = []
    for way in ways:
        method = way["method"]
        form = resolve_method(method).whole_crops
        if form not in encoded:
            encoded[form] = encode(model, inputs, method)
        with attach(model, processor=processor, encoded=encoded[form], **way) as session:
            output = model.generate(**inputs, **generation)
        answer = answers(processor, output, n_prompt)[0]
        compared.append(MethodAnswer(method, answer, session.report[0]))
    # The slowest answer comes last, when every way is known to be possible.
    full = answers(processor, model.generate(**inputs, **generation), n_prompt)[0]
    return full, compared


def _asked(
    model: Any, processor: Any, image: Image.Image, question: str, max_new_tokens: int
) -> dict[str, Any]:
    """The inputs of one question about one picture, checked."""
    need_at_least(1, max_new_tokens=max_new_tokens)
    if not isinstance(image, Image.Image):
        raise InputError(f"image is a {type(image).__name__}; give a PIL.Image")
    inputs = prepare(processor, [image], [check_question(question)], model.device)
    n_tokens = inputs["input_ids"].shape[1]
    n_most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if n_most and n_tokens + max_new_tokens > n_most:
        raise InputError(
            f"the question and the picture have {n_tokens:,} tokens and the answer up to "
            f"{max_new_tokens:,}, and the model was made for {n_most:,}; ask a shorter question"
        )
    return inputs
