"""Recording where SLIM layers send the tokens of a forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import AttachError
from budwood.tune.base_model import evaluating
from budwood.tune.slim.keeper import Routing, RoutingRecorder, keeper_of


@dataclass
class LayerRouting:
    """Sums over the tokens that one layer saw.

    Attributes:
        layer: name of the layer.
        adapter: name of the adapter.
        n_experts: LoRA experts; the other weights are those of identity experts.
        n_tokens: tokens seen; gradient checkpointing shows a token twice, and fused experts once
            for each expert that it goes to.
        weights: sum of routing weights, float64, shape (n_experts + n_identity,).
        bypassed: tokens with no weight on any LoRA expert.
        distance: sum of the standardised distances; 0 where none was measured.
    """

    layer: str
    adapter: str
    n_experts: int
    n_tokens: int = 0
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    bypassed: int = 0
    distance: float = 0.0

    def mean_weights(self) -> Tensor:
        """Average routing weight of each expert, float64, shape (n_experts + n_identity,)."""
        return self.weights / max(self.n_tokens, 1)

    def row(self) -> dict[str, Any]:
        """Averages over the tokens, as a row of a record."""
        mean, n = self.mean_weights(), max(self.n_tokens, 1)
        return {
            "layer": self.layer,
            "adapter": self.adapter,
            "n_tokens": self.n_tokens,
            "identity_share": float(mean[self.n_experts :].sum()),
            "bypassed_share": self.bypassed / n,
            "distance": self.distance / n,
            "weights": [round(float(weight), 6) for weight in mean],
        }


_ADDING = threading.Lock()
"""Threads add one after the other. Not held by a recorder, so that this can be copied."""


class Recorder:
    """Adds up routing by layer and adapter.

    Args:
        supervised: count supervised tokens only, instead of all but padding.

    Attributes:
        layers: (layer, adapter) → :class:`LayerRouting`.
    """

    def __init__(self, supervised: bool = False) -> None:
        self.supervised = supervised
        self.layers: dict[tuple[str, str], LayerRouting] = {}

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer and adapter; see :meth:`LayerRouting.row`."""
        return [layer.row() for layer in self.layers.values()]

    def mean(self, key: str) -> float:
        """Average one number of :meth:`rows` over the layers; NaN without layers."""
        rows = self.rows()
        return sum(row[key] for row in rows) / len(rows) if rows else float("nan")

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Add one forward pass of a layer."""
        weights, distance = _of_all_tokens(routing), routing.distance
        n_experts = routing.config.n_experts
        if routing.keep is not None:
            weights = weights[routing.keep]
            distance = None if distance is None else distance[routing.keep]
        total = weights.double().sum(0).cpu()
        bypassed = int((weights[:, :n_experts] == 0).all(-1).sum())
        far = 0.0 if distance is None else float(distance.double().sum())
        place = (routing.layer, routing.adapter)
        with _ADDING:
            sums = self.layers.setdefault(place, LayerRouting(*place, n_experts))
            sums.n_tokens += len(weights)
            sums.weights = total if not len(sums.weights) else sums.weights + total
            sums.bypassed += bypassed
            sums.distance += far


@contextmanager
def observe(model: nn.Module, *, supervised: bool = False) -> Iterator[Recorder]:
    """Record the routing of every forward pass inside the block, in whatever thread.

    >>> with observe(model) as seen:
    ...     model(**batch)
    >>> seen.rows()[0]["identity_share"]

    Args:
        model: a model with SLIM layers, wrapped or not.
        supervised: count only tokens whose next token has a label, where the model is given labels;
            otherwise all tokens but padding count.

    Raises:
        AttachError: the model has no SLIM layers, or is being observed already.
    """
    recorder = Recorder(supervised)
    with _recording(model, recorder):
        yield recorder


class TokenRecorder:
    """Adds up, for each token of one sequence, the weight on identity experts.

    Layers that see other tokens, such as fused experts, are left out, and so are passes of threads
    other than its maker's.

    Args:
        n_tokens: of the sequence.

    Attributes:
        n_layers: layers that were added.
        identity: sum over them, float64, shape (n_tokens,).
    """

    supervised = False

    def __init__(self, n_tokens: int) -> None:
        self.n_layers, self._thread = 0, threading.get_ident()
        self.identity = torch.zeros(n_tokens, dtype=torch.float64)

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Add one forward pass of a layer."""
        if routing.n_tokens == len(self.identity) and threading.get_ident() == self._thread:
            weights = _of_all_tokens(routing)[:, routing.config.n_experts :]
            self.identity += weights.double().sum(-1).cpu()
            self.n_layers += 1


@torch.no_grad()
def identity_by_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """Measure how much of each token goes to identity experts, which leave it as it is.

    Args:
        model: a model with SLIM layers, wrapped or not.
        tokens: one sequence, int64, shape (n_tokens,).

    Returns:
        The mean over the SLIM layers of the weight on identity experts, in [0, 1], float64, shape
        (n_tokens,).

    Raises:
        AttachError: the model has no SLIM layers, or none that sees single tokens; or it is being
            observed already.
    """
    recorder = TokenRecorder(len(tokens))
    with _recording(model, recorder), evaluating(model):
        model(input_ids=tokens[None].to(next(model.parameters()).device))
    if not recorder.n_layers:
        raise AttachError("no SLIM layer of the model sees single tokens, so none can be shown")
    return recorder.identity / recorder.n_layers


@contextmanager
def _recording(model: nn.Module, recorder: RoutingRecorder) -> Iterator[None]:
    keeper = keeper_of(model)
    if keeper.recorder is not None:
        raise AttachError("the model is being observed already; leave that block first")
    keeper.recorder = recorder
    try:
        yield
    finally:
        keeper.recorder = None


def _of_all_tokens(routing: Routing) -> Tensor:
    """Weights of all tokens; those that were not routed go to the identity experts."""
    if routing.rows is None:
        return routing.weights
    weights = routing.weights.new_zeros(routing.n_tokens, routing.config.n_total)
    weights[:, routing.config.n_experts :] = 1 / max(routing.config.n_identity, 1)
    weights[routing.rows] = routing.weights
    return weights
