"""Watching where tokens go: routing weights, identity share and distance by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import AttachError
from budwood.tune.config import SlimConfig
from budwood.tune.steps import keeper_of


@dataclass
class LayerRouting:
    """Sums over the tokens, without padding, that one layer saw.

    Attributes:
        layer: name of the layer.
        adapter: name of the adapter.
        n_experts: LoRA experts; the rest of the weights are those of identity experts.
        n_tokens: tokens seen; those that gradient checkpointing sees again count again.
        weights: sum of routing weights, float64, shape (n_experts + n_identity,).
        bypassed: tokens with no weight on any LoRA expert.
        distance: sum of the standardised distances; 0 where none was computed.
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
        """Averages as a row of a record."""
        mean, n = self.mean_weights(), max(self.n_tokens, 1)
        return {
            "layer": self.layer,
            "adapter": self.adapter,
            "n_tokens": self.n_tokens,
            "identity_share": float(mean[self.n_experts :].sum()),
            "bypassed_share": self.bypassed / n,
            "distance": self.distance / n,
            "weights": [round(float(one), 6) for one in mean],
        }


class Recorder:
    """Adds up routing by layer and adapter while it is open.

    Args:
        learnt: only of tokens whose next token is learnt.
    """

    def __init__(self, learnt: bool = False) -> None:
        self.learnt = learnt
        self.layers: dict[tuple[str, str], LayerRouting] = {}

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer and adapter; see :meth:`LayerRouting.row`."""
        return [one.row() for one in self.layers.values()]

    def mean(self, key: str) -> float:
        """Average over layers of one number of :meth:`rows`, NaN without layers."""
        rows = self.rows()
        return sum(row[key] for row in rows) / len(rows) if rows else float("nan")

    @torch.no_grad()
    def add(
        self,
        place: tuple[str, str],
        config: SlimConfig,
        weights: Tensor,
        rows: Tensor | None,
        distance: Tensor | None,
        keep: Tensor | None,
        n_tokens: int,
    ) -> None:
        """Note one forward pass of a layer.

        Args:
            place: names of the layer and the adapter.
            config: of the adapter.
            weights: routing weights, shape (n_routed, n_experts + n_identity).
            rows: tokens that were routed, shape (n_routed,); the others surely bypass. None: all.
            distance: standardised distance of all tokens, shape (n_tokens,), or None.
            keep: tokens that count, bool of shape (n_tokens,); None for all.
            n_tokens: tokens of the pass.
        """
        everyone = weights
        if rows is not None:
            everyone = weights.new_zeros(n_tokens, config.n_total)
            everyone[:, config.n_experts :] = 1 / max(config.n_identity, 1)
            everyone[rows] = weights
        if keep is not None:
            everyone = everyone[keep]
            distance = None if distance is None else distance[keep]
        found = self.layers.setdefault(place, LayerRouting(*place, config.n_experts))
        found.n_tokens += len(everyone)
        total = everyone.double().sum(0).cpu()
        found.weights = total if not len(found.weights) else found.weights + total
        found.bypassed += int((everyone[:, : config.n_experts] == 0).all(-1).sum())
        found.distance += 0.0 if distance is None else float(distance.double().sum())


@contextmanager
def observe(model: nn.Module, *, learnt: bool = False) -> Iterator[Recorder]:
    """Note the routing of every forward pass inside the block.

    >>> with observe(model) as seen:
    ...     model(**batch)
    >>> seen.rows()[0]["identity_share"]

    Args:
        model: a model with SLIM layers, wrapped or not.
        learnt: count tokens whose next token is learnt alone, by the labels that the model is
            given; all but padding where it is given none.

    Raises:
        AttachError: the model has no SLIM layers, or is being observed already.
    """
    keeper = keeper_of(model)
    if keeper.recorder is not None:
        raise AttachError("the model is being observed already; leave that block first")
    keeper.recorder = Recorder(learnt)
    try:
        yield keeper.recorder
    finally:
        keeper.recorder = None
