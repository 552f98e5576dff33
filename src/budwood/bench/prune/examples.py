"""Example pictures for a report: questions of a record, and what its methods keep."""

from __future__ import annotations

from typing import Any

from budwood.bench.prune.plan import Variant
from budwood.bench.report import Example
from budwood.errors import InputError
from budwood.prune.compare import compare_ways
from budwood.prune.overlay import draw_methods
from budwood.records import Record
from budwood.sprout.questions import balanced


def examples_of(
    model: Any, processor: Any, record: Record, number: int, n_methods: int
) -> list[Example]:
    """Answer questions of a record's scenes again, one a scene, at the smallest of its budgets.

    Args:
        model: the model of the record.
        processor: its processor.
        record: of `budwood bench prune`.
        number: pictures.
        n_methods: methods in each, the first of the record that prune before the LLM.

    Raises:
        InputError: the record has fewer scenes, no such method, is of chats or malformed.
    """
    config = _checked(record.config)
    if config.get("turns", 1) > 1:
        raise InputError(
            f"the record is of chats of {config['turns']} turns, and examples are single "
            "questions; leave --examples out, or give another record"
        )
    if number > config["n_scenes"]:
        raise InputError(
            f"{number} examples, one for each scene, and the record has {config['n_scenes']} "
            "scenes; give fewer examples"
        )
    ways = _ways(record, n_methods)
    made = []
    large = config.get("high_resolution", False)  # records from before it lack it
    drawn = balanced(config["seed"], number, config["split"], large)
    for place, (scene, questions) in enumerate(drawn):
        question = questions[place % len(questions)]
        full, compared = compare_ways(
            model,
            processor,
            scene.image,
            question.text,
            ways,
            max_new_tokens=config["max_new_tokens"],
        )
        picture = draw_methods(
            scene.image,
            {one.method: one.report for one in compared},
            {one.method: f"answer: {one.answer}" for one in compared},
        )
        caption = f"{question.text} Right: {question.answer}; all tokens: {full}."
        made.append(Example(picture, caption))
    return made


_NEEDED = {
    "n_scenes": int,
    "seed": int,
    "max_new_tokens": int,
    "split": str,
    "variants": list,
}
"""What the config of a record has that examples are made from."""


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    for key, kind in _NEEDED.items():
        if not isinstance(config.get(key), kind):
            raise InputError(
                f"the record is malformed: {key!r} of its config is {config.get(key)!r}; leave "
                "--examples out, or give another record"
            )
    return config


def _ways(record: Record, n_methods: int) -> list[dict[str, Any]]:
    """Options of ``attach`` for the first methods of a record, at the smallest of its budgets."""
    first: dict[str, Variant] = {}
    for given in record.config["variants"]:
        if not isinstance(given, dict) or not isinstance(given.get("method"), str):
            raise InputError(f"the record is malformed: one of its variants is {given!r}")
        # Older records lack some fields.
        variant = Variant(given["method"], given.get("question"), given.get("positions"))
        if not variant.inside:
            first.setdefault(variant.method, variant)
    if not first:
        raise InputError("the record has no method that prunes before the LLM to show")
    # Budgets may be counts and fractions; rows have both as counts.
    fewest = min(record.rows, key=lambda row: row["n_kept"])
    if "keep" not in fewest:
        raise InputError("the record is malformed: 'keep' of a row is missing")
    shared = {"keep": fewest["keep"], "seed": record.config["seed"]}
    return [{**variant.options, **shared} for variant in [*first.values()][:n_methods]]
