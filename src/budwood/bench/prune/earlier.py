"""Answers in the records of earlier comparisons, so that one more method costs only itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from budwood.bench.prune.plan import Config, Run
from budwood.errors import InputError
from budwood.records import Record, Row

SAME = (
    *("seed", "split", "high_resolution", "turns", "max_new_tokens", "batch"),
    *("weights", "dtype"),
)
"""Keys of a record's config on which an answer depends, beside its run."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier comparison has of a run.

    Attributes:
        right: whether each question was answered correctly, in the order of the scenes.
        n_kept: visual tokens that the LLM saw, the mean over the questions.
    """

    right: list[bool]
    n_kept: float


def earlier_answers(
    record: Record, described: Mapping[str, Any], config: Config
) -> dict[Run, Earlier]:
    """Find the runs of a comparison in an earlier record.

    A run is the same if its method, all parameters of the method, budget, text and positions are.
    The code of a method may have changed since: a record has its commit.

    Args:
        record: of ``budwood bench prune``; of the same scenes, or of the first of them.
        described: the config of this comparison, as its record will have it.
        config: this comparison.

    Raises:
        InputError: the record is of something else, unfinished, without answers, of more scenes, or
            of other questions or weights. The message lacks the name of the record.
    """
    if record.name != "bench prune" or record.status != "complete":
        raise InputError(
            f"is a {record.status} record of {record.name!r}; give a complete one of 'bench prune'"
        )
    if not all("right" in row for row in record.rows):
        raise InputError("is older than answers in records; measure it anew")
    differing = [
        f"{key} {record.config.get(key)!r}, not {described[key]!r}"
        for key in SAME
        if record.config.get(key) != described[key]
    ]
    if record.config["n_scenes"] > config.n_scenes:
        differing.append(f"{record.config['n_scenes']} scenes, more than {config.n_scenes}")
    if differing:
        raise InputError(f"has other answers ({', '.join(differing)}); give the same settings")
    rows = {_key({name: row.get(name) for name in _IDENTITY}): row for row in record.rows}
    n_questions = record.config["n_questions"]
    return {
        run: Earlier(unpack(row["right"], n_questions), row["n_kept"])
        for run in config.runs
        if (row := rows.get(_key(identity(run))))
    }


def _key(identity: Row) -> str:
    """As text, since 1 (a token) and 1.0 (all of them) are equal as numbers."""
    return repr(identity)


_IDENTITY = ("method", "keep", "question", "positions", "resolved")


def identity(run: Run) -> Row:
    """The part of a row that says which run it is of."""
    variant = run.variant
    values = (
        run.method,
        1.0 if run.keep is None else run.keep,
        variant.question if variant else None,
        variant.placed if variant else None,
        variant.resolved if variant else None,
    )
    return dict(zip(_IDENTITY, values))


def pack(right: Sequence[bool]) -> str:
    """Booleans as bits, in base64."""
    return base64.b64encode(np.packbits(np.array(right, dtype=bool)).tobytes()).decode()


def unpack(text: str, n: int) -> list[bool]:
    """The first n booleans of :func:`pack`.

    Raises:
        InputError: the text is no base64, or has another number of bytes.
    """
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except ValueError as error:
        raise InputError(f"has damaged answers ({error}); measure it anew") from None
    if len(packed) != -(-n // 8):
        raise InputError(f"has {8 * len(packed)} answers to {n} questions; measure it anew")
    return np.unpackbits(packed, count=n).astype(bool).tolist()
