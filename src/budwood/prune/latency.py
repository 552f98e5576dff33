"""Time to first token and per decoded token, measured around ``generate`` itself."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from budwood.prune.chat import GREEDY
from budwood.prune.session import PruneSession
from budwood.timing import synchronize
from budwood.unwrap import innermost


@dataclass(frozen=True)
class FirstToken:
    """Time from the call of ``generate`` to its first token, and where it went.

    Attributes:
        total_ms: all of it.
        encode_ms: vision encoder and projector.
        select_ms: saliency row, selection and cutting the prompt; 0 without pruning.
    """

    total_ms: float
    encode_ms: float = 0.0
    select_ms: float = 0.0

    @property
    def prefill_ms(self) -> float:
        """The rest: the LLM reading the prompt, and what ``generate`` does around it."""
        return self.total_ms - self.encode_ms - self.select_ms

    @classmethod
    def median(cls, times: list[FirstToken]) -> FirstToken:
        """The median of each part and of the total, each by itself."""
        parts = zip(*((time.total_ms, time.encode_ms, time.select_ms) for time in times))
        return cls(*map(statistics.median, parts))

    def as_dict(self) -> dict[str, float]:
        """All four times, rounded to a microsecond."""
        names = ("total_ms", "encode_ms", "select_ms", "prefill_ms")
        return {name: round(getattr(self, name), 3) for name in names}


@dataclass(frozen=True, eq=False)
class Timed:
    """One timed call of ``generate``.

    Attributes:
        sequences: its output, int64, shape (1, n_prompt + n_new).
        first: time to the first token.
        step_ms: time of each further token.
    """

    sequences: Tensor
    first: FirstToken
    step_ms: tuple[float, ...]


class _Clock:
    """A streamer that notes the time of each token; the first call is the prompt."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def generate_timed(
    model: Any, inputs: Mapping[str, Any], session: PruneSession | None = None, **options: Any
) -> Timed:
    """Time a greedy ``generate`` of one row.

    On a GPU the encoder is waited for, so that the parts are right; attach with ``timing=True``.

    Args:
        model: the model.
        inputs: of one row, see :func:`budwood.prune.chat.prepare`.
        session: what is attached to the model; None if nothing is.
        options: of ``generate``.
    """
    clock = _Clock()
    with _encoder_clock(innermost(model)) as encoded_ms:
        start = _now(model)
        sequences = model.generate(**inputs, **GREEDY, streamer=clock, **options)
    stamps = clock.stamps[1:]
    total_ms = 1e3 * (stamps[0] - start)
    if session is None:
        first = FirstToken(total_ms, sum(encoded_ms))
    else:
        first = FirstToken(total_ms, session.timing.encode_ms, session.timing.select_ms)
    steps = tuple(1e3 * (after - before) for before, after in pairwise(stamps))
    return Timed(sequences, first, steps)


@contextmanager
def _encoder_clock(model: Any) -> Iterator[list[float]]:
    """Measure every run of the image encoder inside, in milliseconds."""
    base = model.base_model  # generate() and the model's own method both end up here
    before = base.__dict__.get("get_image_features")
    original, spent = base.get_image_features, []

    @functools.wraps(original)  # transformers reads the signature
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _now(model)
        features = original(*args, **kwargs)
        spent.append(1e3 * (_now(model) - start))
        return features

    base.get_image_features = timed
    try:
        yield spent
    finally:
        if before is None:
            del base.get_image_features
        else:
            base.get_image_features = before


def _now(model: Any) -> float:
    synchronize(model.device)
    return time.perf_counter()
