"""What a pass through a SLIM layer is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from budwood.tune.config import SlimConfig
from budwood.tune.slim.autograd import Side
from budwood.tune.slim.state import InputStatistics

Times = Callable[[Tensor, Tensor, Side | None], Tensor]
"""A product x·Wᵀ, with how W is used in training."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of one adapter.

    Attributes:
        name: of the adapter.
        config: of the adapter.
        training: it is a pass of training; reentrant checkpointing begins these without gradients.
        gather: it has gradients, so that statistics are gathered in its backward pass.
        masked: a mask of dynamic merging is in force.
        part: the input of the whole batch and the rows of it that use the adapter, where rows use
            different ones; None for all.
    """

    name: str
    config: SlimConfig
    training: bool
    gather: bool
    masked: bool
    part: tuple[Tensor, Tensor] | None = None


class Weight(nn.Module):
    """Holds one matrix, as a ``Linear`` without bias does.

    Args:
        weight: shape (rows, columns).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass(frozen=True, eq=False)
class SharedStatistics:
    """Statistics that another layer holds.

    Attributes:
        statistics: of the other layer.
        follows: the other layer begins the block that this one ends, and reads another input.
    """

    statistics: InputStatistics
    follows: bool
