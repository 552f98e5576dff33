"""What must not change: text of the base model itself, to which the distance is relative.

Ours. The distance to the training data alone does not know what else there is. A model's own text
shows it: no other data are needed, since the model also makes up what it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.tune.encoding import LeftPadded, Row, n_learnt, pad_of, takes_logits_to_keep
from budwood.tune.own_text import own_text
from budwood.tune.state import Clusters, WhitenedClusters, check_finite
from budwood.tune.steps import keeper_of, layers_of, tell_labels

N_TEXTS = 64
"""Of the base model's own, where no others are given."""
TOKENS_A_DIRECTION = 5
"""Fewer tokens to each direction are refused: their covariance would know these alone."""


class Survey:
    """Takes the inputs of layers in, while it is a keeper's: first their scales, then the rest."""

    def __init__(self) -> None:
        self.scales = True
        self.sums: dict[WhitenedClusters, tuple[int, Tensor, Tensor]] = {}

    def see(self, clusters: Clusters, x: Tensor, keep: Tensor | None) -> None:
        """Note a layer's inputs, shape (…, d_in); ``keep`` says which tokens count."""
        if not isinstance(clusters, WhitenedClusters):
            return
        flat = x.detach().reshape(-1, x.shape[-1])
        flat = flat if keep is None else flat[keep]
        with torch.autocast(x.device.type, enabled=False):
            if self.scales:
                clusters.standardise(flat)
                return
            first, second = clusters.products(flat)
        n, *sums = self.sums.get(clusters, (0, 0, 0))
        self.sums[clusters] = (n + len(flat), sums[0] + first, sums[1] + second)


@torch.no_grad()
def fit_background(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row] | None = None,
    *,
    batch: int = 16,
    seed: int = 0,
    advance: Callable[..., None] | None = None,
) -> int:
    """Show a fresh SLIM adapter text that must not change; to be called before training.

    Afterwards the distance of a token is that to the training data minus that to this text. With
    ``distance="whitened"`` only. Source of the idea: relative Mahalanobis distance, arXiv
    2106.09022; that its background is the model's own text is ours.

    Args:
        model: from ``peft.get_peft_model``, its active adapter SLIM's and not trained yet.
        tokenizer: of the model.
        rows: ``input_ids`` and ``labels``, −100 at tokens that do not count; None for
            ``N_TEXTS`` texts drawn from the model itself, which needs a chat template.
        batch: rows at a time.
        seed: of the draws.
        advance: a function (done, total, note), for a progress bar.

    Returns:
        How many tokens count.

    Raises:
        AttachError: the model has no SLIM layers.
        InputError: the adapter has no such distance or was trained, or the text is too short.
    """
    found = _fresh_clusters(model)
    if rows is None:
        rows = own_text(model, tokenizer, N_TEXTS, batch=batch, seed=seed, advance=advance)
    _check_rows(rows, max(len(one.covariance) for one in found))
    with _survey(model) as survey:
        _pass_through(model, tokenizer, rows[:batch], batch)
        survey.scales = False
        _pass_through(model, tokenizer, rows, batch, advance)
    firsts = [first for _, first, _ in survey.sums.values()]
    check_finite(torch.cat(firsts), [one.key for one in survey.sums], [len(one) for one in firsts])
    for clusters, sums in survey.sums.items():
        clusters.set_background(*sums)
    return n_learnt(rows)


def _clusters(model: nn.Module) -> list[WhitenedClusters]:
    return [
        clusters
        for layer in layers_of(model)
        for name, clusters in layer.slim_clusters.items()
        if name in layer.trained_adapters() and isinstance(clusters, WhitenedClusters)
    ]


def _fresh_clusters(model: nn.Module) -> list[WhitenedClusters]:
    keeper_of(model)  # refuses a model without SLIM layers
    found = _clusters(model)
    if not found:
        raise InputError(
            "no adapter that is being trained has a distance that a background is for; give "
            'SlimConfig(distance="whitened")'
        )
    steps = max(one.steps for one in found)
    if steps:
        raise InputError(
            f"the adapter was trained for {steps} steps, and its distances are those without "
            "this background; fit it to a fresh adapter"
        )
    return found


def _check_rows(rows: Sequence[Row], n_directions: int) -> None:
    empty = next((i for i, row in enumerate(rows) if not n_learnt([row])), None)
    if empty is not None:
        raise InputError(f"row {empty} of the background has no token that counts; leave it out")
    n, least = n_learnt(rows), TOKENS_A_DIRECTION * n_directions
    if n < least:
        raise InputError(
            f"the background has {n} tokens that count; {n_directions} directions need {least}: "
            "give more text or fewer n_directions"
        )


@contextmanager
def _survey(model: nn.Module) -> Iterator[Survey]:
    """Layers show their inputs and change nothing; dropout is off."""
    keeper, training = keeper_of(model), model.training
    model.eval()
    keeper.survey = survey = Survey()
    try:
        yield survey
    finally:
        keeper.survey, keeper.labels = None, None
        model.train(training)


def _pass_through(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    batch: int,
    advance: Callable[..., None] | None = None,
) -> None:
    device = next(model.parameters()).device
    collate = LeftPadded(pad_of(tokenizer), trim=takes_logits_to_keep(model))
    for start in range(0, len(rows), batch):
        inputs = collate(rows[start : start + batch])
        tell_labels(model, inputs.pop("labels"))
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        if advance:
            advance(min(start + batch, len(rows)), len(rows))
