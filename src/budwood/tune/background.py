"""What must not change: text of the base model itself, to which the distance is relative.

Ours. The distance to the training data alone does not know what else there is. A model's own text
shows it: no other data are needed, since the model also makes up what it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.tune.clustering import channel_scale
from budwood.tune.encoding import LeftPadded, Row, n_learnt, pad_of, takes_logits_to_keep
from budwood.tune.modes import evaluating
from budwood.tune.own_text import own_text
from budwood.tune.state import WhitenedClusters
from budwood.tune.steps import keeper_of, layers_of, tell_labels
from budwood.tune.whitening import project

N_TEXTS = 128
"""Of the base model's own, where no others are given."""
LEAST_TOKENS = 5
"""To each direction: the covariance of fewer would know these alone."""


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
        model: from ``peft.get_peft_model``; its adapters that are trained are SLIM's and fresh.
        tokenizer: of the model.
        rows: ``input_ids`` and ``labels``; tokens whose next one has a label other than −100
            count. None for ``N_TEXTS`` texts drawn from the model itself, which needs a chat
            template.
        batch: rows at a time.
        seed: of the draws.
        advance: a function (done, total, note), for a progress bar.

    Returns:
        How many tokens count.

    Raises:
        AttachError: the model has no SLIM layers.
        InputError: the adapter has no such distance or was trained, the text is too short, or the
            model's values on it are NaN or infinite.
        UnsupportedModelError: the chat template does not show where a user's turn begins.
    """
    found = _fresh_clusters(model)
    if rows is None:
        rows = own_text(model, tokenizer, N_TEXTS, batch=batch, seed=seed, advance=advance)
    _check_rows(rows, LEAST_TOKENS * max(len(one.covariance) for one in found))
    scales = _Scales()
    _show(model, tokenizer, rows, batch, scales)
    products = _Products(scales.found())
    _show(model, tokenizer, rows, batch, products)
    _check_finite(products)
    for clusters, (n, first, second) in products.sums.items():
        clusters.set_background(n, *products.scales[clusters], first / n, second / n)
    return n_learnt(rows)


class Survey(Protocol):
    """What layers show their inputs to, while it is a keeper's."""

    def see(self, clusters: WhitenedClusters, x: Tensor) -> None:
        """Note inputs of a layer: tokens that count, shape (n_tokens, d_in)."""


class _Scales:
    """Sums by which the channels are standardised."""

    def __init__(self) -> None:
        self.sums: dict[WhitenedClusters, tuple[int, Tensor, Tensor]] = {}

    def see(self, clusters: WhitenedClusters, x: Tensor) -> None:
        x = x.double()
        _add(self.sums, clusters, len(x), x.sum(0), x.square().sum(0))

    def found(self) -> dict[WhitenedClusters, tuple[Tensor, Tensor]]:
        """Mean and 1/σ of each channel, float32."""
        found = {}
        for clusters, (n, first, second) in self.sums.items():
            mean = first / n
            var = (second / n - mean.square()).clamp(min=0)
            found[clusters] = mean.float(), channel_scale(var.float())
        return found


class _Products:
    """Sums by which places in the subspace are whitened."""

    def __init__(self, scales: dict[WhitenedClusters, tuple[Tensor, Tensor]]) -> None:
        self.scales = scales
        self.projections = {one: one.projection(*found) for one, found in scales.items()}
        self.sums: dict[WhitenedClusters, tuple[int, Tensor, Tensor]] = {}

    def see(self, clusters: WhitenedClusters, x: Tensor) -> None:
        z = project(x.float(), *self.projections[clusters])
        _add(self.sums, clusters, len(z), z.sum(0), z.T @ z)


def _add(sums: dict[Any, Any], key: Any, n: int, first: Tensor, second: Tensor) -> None:
    if key in sums:
        old = sums[key]
        n, first, second = n + old[0], first + old[1], second + old[2]
    sums[key] = n, first, second


def _fresh_clusters(model: nn.Module) -> list[WhitenedClusters]:
    keeper_of(model)  # refuses a model without SLIM layers
    found = [clusters for layer in layers_of(model) for clusters in layer.trained_whitened()]
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
    bad = next((i for i, row in enumerate(rows) if not n_learnt([row])), None)
    if bad is not None:
        raise InputError(f"row {bad} of the background has no token that counts; leave it out")
    n = n_learnt(rows)
    if n < least:
        raise InputError(
            f"the background has {n} tokens that count and needs {least}, {LEAST_TOKENS} to each "
            "direction: give more text (slim:background=256), fewer directions "
            "(slim:n_directions=64) or no background (slim:background=0)"
        )


def _check_finite(products: _Products) -> None:
    for clusters, (_, first, second) in products.sums.items():
        if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
            raise InputError(
                f"inputs of layer {clusters.key!r} are NaN or infinite on the background; load "
                "the model in bfloat16 or float32"
            )


def _show(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], batch: int, survey: Survey
) -> None:
    """Pass rows through the model, whose layers show their inputs and change nothing."""
    device = next(model.parameters()).device
    collate = LeftPadded(pad_of(tokenizer), trim=takes_logits_to_keep(model))
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
