"""Fitting the discriminant: the base model reads training data, and text that must not change.

Ours. The distance to the training data alone does not know what else there is. A model's own text
shows it: no other data are needed, since the model also makes up what it is asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.progress import Progress, silent
from budwood.tune.discriminant import discriminant
from budwood.tune.encoding import EncodedExample, Padded, n_supervised
from budwood.tune.modes import evaluating
from budwood.tune.self_generated import self_generate
from budwood.tune.state import Discriminant
from budwood.tune.steps import keeper_of, layers_of, tell_labels

N_TEXTS = 128
"""Of the base model's own, where no others are given."""
N_EXAMPLES = 256
"""Of the training data are read at least, and more until ``MOST_TOKENS`` count."""
MOST_TOKENS = 4096
"""Of either, evenly drawn where there are more: inputs of all layers are kept for a while."""
LEAST_TOKENS = 32


@torch.no_grad()
def fit_discriminant(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[EncodedExample],
    other: Sequence[EncodedExample] | None = None,
    *,
    batch: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[int, int]:
    """Show a fresh SLIM adapter training data and text that must not change, before training.

    For ``distance="discriminant"``, which cannot do without.

    Args:
        model: from ``peft.get_peft_model``; its adapters that are trained are SLIM's and fresh.
        tokenizer: of the model.
        rows: training data, ``input_ids`` and ``labels``, of which as many are drawn as give
            ``MOST_TOKENS``, and at least ``N_EXAMPLES``. Tokens count whose next one has a label
            other than −100; with ``fit_on="all"`` all.
        other: text that must not change, in the same form. None for ``N_TEXTS`` texts drawn from
            the model itself, which needs a chat template.
        batch: rows at a time.
        seed: of the draws.
        progress: called after each batch.

    Returns:
        How many tokens of each have labels.

    Raises:
        AttachError: the model has no SLIM layers.
        InputError: the adapter has no such distance or was trained, there is too little text, it
            does not reach a layer, or the model's values on it are NaN or infinite.
        UnsupportedModelError: the chat template does not show where a user's turn begins.
    """
    found = _fresh(model)
    need_at_least(1, batch=batch)
    _check_rows("training data", rows)
    if other is None:
        other = self_generate(model, tokenizer, N_TEXTS, batch=batch, seed=seed, progress=progress)
    _check_rows("other text", other)
    rows = _drawn(rows, seed)
    seen = []
    for text in (rows, other):
        survey = Survey(MOST_TOKENS / (1 + len(text) // batch))
        _show(model, tokenizer, text, batch, survey)
        seen.append(survey.kept)
    _need_inputs(found, seen)
    fitted = [(one, _fit(one, *(kept[one] for kept in seen))) for one in found]
    for clusters, (direction, offset, n) in fitted:
        clusters.set_direction(direction, offset, n)
    return n_supervised(rows), n_supervised(other)


class Survey:
    """What layers show their inputs to while it is a keeper's: it keeps them.

    Args:
        most: tokens of a layer in one forward pass.
    """

    def __init__(self, most: float) -> None:
        self.most = max(1, round(most))
        self.kept: dict[Discriminant, list[Tensor]] = {}

    def see(self, clusters: Discriminant, x: Tensor) -> None:
        """Note inputs of a layer: tokens that count, shape (n_tokens, d_in)."""
        if not len(x):
            return
        if len(x) > self.most:
            x = x[torch.linspace(0, len(x) - 1, self.most).round().long().to(x.device)]
        self.kept.setdefault(clusters, []).append(x.clone())


def _need_inputs(
    layers: Sequence[Discriminant], seen: Sequence[dict[Discriminant, list[Tensor]]]
) -> None:
    missing = next((one for one in layers if any(one not in kept for kept in seen)), None)
    if missing is not None:
        raise InputError(
            f"layer {missing.key!r} reads no token that counts of this text, as where a model is "
            "given text alone and has parts for other input; leave the layer out of the target "
            'modules, or take another distance ("whitened")'
        )


def _fit(
    clusters: Discriminant, own: list[Tensor], other: list[Tensor]
) -> tuple[Tensor, Tensor, int]:
    both = [torch.cat(part).float() for part in (own, other)]
    direction, offset = discriminant(*both)
    if not bool(torch.isfinite(direction).all() and torch.isfinite(offset)):
        raise InputError(
            f"inputs of layer {clusters.key!r} are NaN or infinite on this text; load the model "
            "in bfloat16 or float32"
        )
    return direction, offset, sum(map(len, both))


def _fresh(model: nn.Module) -> list[Discriminant]:
    keeper_of(model)  # refuses a model without SLIM layers
    found = [clusters for layer in layers_of(model) for clusters, _ in layer.discriminants()]
    if not found:
        raise InputError(
            "no adapter that is being trained has a distance that is fitted; give "
            'SlimConfig(distance="discriminant")'
        )
    steps = max(one.steps for one in found)
    if steps:
        raise InputError(
            f"the adapter was trained for {steps} steps, and its distances are those of before; "
            "fit a fresh adapter"
        )
    return found


def _drawn(rows: Sequence[EncodedExample], seed: int) -> list[EncodedExample]:
    """Rows, drawn until there are enough of them and of their tokens, in their order."""
    drawn: list[int] = []
    n_tokens = 0
    for i in random.Random(seed).sample(range(len(rows)), len(rows)):
        if len(drawn) >= N_EXAMPLES and n_tokens >= MOST_TOKENS:
            break
        drawn.append(i)
        n_tokens += n_supervised([rows[i]])
    return [rows[i] for i in sorted(drawn)]


def _check_rows(what: str, rows: Sequence[EncodedExample]) -> None:
    bad = next((i for i, row in enumerate(rows) if not n_supervised([row])), None)
    if bad is not None:
        raise InputError(f"row {bad} of the {what} has no token that counts; leave it out")
    n = n_supervised(rows)
    if n < LEAST_TOKENS:
        raise InputError(
            f"the {what} has {n} tokens that count and needs {LEAST_TOKENS}: give more, or "
            'another distance ("whitened")'
        )


def _show(
    model: nn.Module, tokenizer: Any, rows: Sequence[EncodedExample], batch: int, survey: Survey
) -> None:
    """Pass rows through the model, whose layers show their inputs and change nothing."""
    device = next(model.parameters()).device
    collate = Padded.of(model, tokenizer)
    with _shown_to(model, survey), evaluating(model):
        for start in range(0, len(rows), batch):
            inputs = collate(rows[start : start + batch])
            tell_labels(model, inputs.pop("labels"))
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})


@contextmanager
def _shown_to(model: nn.Module, survey: Survey) -> Iterator[None]:
    keeper = keeper_of(model)
    keeper.survey = survey
    try:
        yield
    finally:
        keeper.survey, keeper.labels = None, None
