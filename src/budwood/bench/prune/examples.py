"""Example pictures for a report: questions of a record, and what its methods keep."""

from __future__ import annotations

from typing import Any

from budwood.bench.report import Example
from budwood.errors import InputError
from budwood.prune.compare import compare_methods
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
        n_methods: methods in each, the first of the record.

    Raises:
        InputError: the record has fewer scenes, or no method.
    """
    config = record.config
    if number > config["n_scenes"]:
        raise InputError(
            f"{number} examples, one for each scene, and the record has {config['n_scenes']} "
            "scenes; give fewer examples"
        )
    methods = list(dict.fromkeys(variant["method"] for variant in config["variants"]))[:n_methods]
    texts = [variant["question"] for variant in config["variants"] if variant["question"]]
    # Budgets may be counts and fractions; rows have both as counts.
    fewest = min(record.rows, key=lambda row: row["n_kept"])
    options = {"keep": fewest["keep"], "seed": config["seed"]}
    options |= {"question": texts[0]} if texts else {}
    made = []
    large = config.get("high_resolution", False)  # records from before it lack it
    drawn = balanced(config["seed"], number, config["split"], large)
    for place, (scene, questions) in enumerate(drawn):
        question = questions[place % len(questions)]
        full, compared = compare_methods(
            model,
            processor,
            scene.image,
            question.text,
            methods,
            options,
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
