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

N_TEXTS = 128
"""Of the base model's own, where no others are given."""
TOKENS_A_DIRECTION = 5
"""Fewer tokens to each direction are refused: their covariance would know these alone."""
FIRST_SHARE = 0.2
"""Weight of the tokens that decide how a reply begins, of which each text has only one."""


Sums = tuple[int, Tensor, Tensor]
"""Number of tokens, and the sums of their z and z·zᵀ."""


class Survey:
    """Takes the inputs of layers in, while it is a keeper's: first their scales, then the rest."""

    def __init__(self) -> None:
        self.scales = True
        self.sums: dict[WhitenedClusters, tuple[Sums, Sums]] = {}

    def see(self, clusters: Clusters, x: Tensor, keep: Tensor | None) -> None:
        """Note a layer's inputs.

        Args:
            clusters: of the layer.
            x: shape (batch, length, d_in).
            keep: tokens that count, bool of shape (batch · length,); None for all.
        """
        if not isinstance(clusters, WhitenedClusters):
            return
        kept = torch.ones_like(x[..., 0], dtype=torch.bool) if keep is None else keep
        kept = kept.view(x.shape[:2])
        first = kept & (kept.cumsum(-1) == 1)
        with torch.autocast(x.device.type, enabled=False):
            if self.scales:
                clusters.standardise(x[kept])
                return
            old = self.sums.get(clusters, ((0, 0, 0),) * 2)
            parts = (x[first], x[kept & ~first])
            self.sums[clusters] = tuple(  # type: ignore[assignment]
                _added(before, (len(part), *clusters.products(part)))
                for before, part in zip(old, parts)
            )

    def averages(self, clusters: WhitenedClusters, first_share: float) -> tuple[Tensor, Tensor]:
        """Averages of z and z·zᵀ, the first tokens of all texts at a given share of the weight."""
        (n_first, *of_first), (n_rest, *of_rest) = self.sums[clusters]
        share = first_share if n_first and n_rest else float(n_first > 0)
        mean, second = (
            share * a / max(n_first, 1) + (1 - share) * b / max(n_rest, 1)
            for a, b in zip(of_first, of_rest)
        )
        return mean, second


def _added(one: Any, other: Any) -> Any:
    return tuple(a + b for a, b in zip(one, other))


@torch.no_grad()
def fit_background(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row] | None = None,
    *,
    first_share: float = FIRST_SHARE,
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
        first_share: weight of the first token that counts of all rows together, in [0, 1].
        batch: rows at a time.
        seed: of the draws.
        advance: a function (done, total, note), for a progress bar.

    Returns:
        How many tokens count.

    Raises:
        AttachError: the model has no SLIM layers.
        InputError: the adapter has no such distance or was trained, or the text is too short.
    """
    if not 0 <= first_share <= 1:
        raise InputError(f"first_share={first_share}; give a share in [0, 1]")
    least = TOKENS_A_DIRECTION * max(len(one.covariance) for one in _fresh_clusters(model))
    if rows is None:
        rows = own_text(model, tokenizer, N_TEXTS, batch=batch, seed=seed, advance=advance)
    _check_rows(rows, least)
    with _survey(model) as survey:
        _pass_through(model, tokenizer, rows[:batch], batch)
        survey.scales = False
        _pass_through(model, tokenizer, rows, batch, advance)
    found = {one: survey.averages(one, first_share) for one in survey.sums}
    means = [mean for mean, _ in found.values()]
    check_finite(torch.cat(means), [one.key for one in found], [len(one) for one in means])
    n = n_learnt(rows)
    for clusters, averages in found.items():
        clusters.set_background(n, *averages)
    return n


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


def _check_rows(rows: Sequence[Row], least: int) -> None:
    empty = next((i for i, row in enumerate(rows) if not n_learnt([row])), None)
    if empty is not None:
        raise InputError(f"row {empty} of the background has no token that counts; leave it out")
    n = n_learnt(rows)
    if n < least:
        raise InputError(
            f"the background has {n} tokens that count and needs {least}, "
            f"{TOKENS_A_DIRECTION} to each of n_directions; give more text or fewer directions"
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
