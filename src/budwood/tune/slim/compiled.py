"""SLIM inside a graph of ``torch.compile``.

A layer has a part that is Python by nature: statistics that know their step, and moments that are
gathered in the backward pass and counted once per optimiser step. A graph takes these as operators
that it does not look into:

- ``budwood::slim_distance`` measures the distances, and returns the moments beside them;
- ``budwood::slim_last_distance`` returns the distances of a block's first layer to its last;
- ``budwood::slim_used`` returns a weight as a pass uses it;
- ``budwood::slim_settle``, its backward, masks the gradient, adds the penalty and hands over the
  moments.

The objects behind them are found by a handle, a number in a tensor on the CPU. As a tensor it is an
input of the graph, so that layers of one shape share one graph.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from budwood.tune.slim.autograd import Side

_OBJECTS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def new_handle(thing: object) -> Tensor:
    """Make a number by which operators find an object, int64, shape (), on the CPU."""
    number = next(_NUMBERS)
    _OBJECTS[number] = thing
    return torch.tensor(number, device="cpu")


class Noting(Protocol):
    """What the operators know about a layer."""

    def noted(self, adapter: str, moments: Tensor | None) -> bool:
        """Note a backward pass of A, with its moments, or of B; return if the penalty is due."""
        ...


def distance_in_graph(
    statistics: Any, x: Tensor, keep: Tensor | None, *, gather: bool, training: bool
) -> tuple[Tensor, Tensor]:
    """Measure distances inside a graph.

    Two layers that share an input ask with the same arguments, and the graph keeps one call.

    Args:
        statistics: of the input.
        x: the layer's input, shape (…, d_in).
        keep: as in :meth:`InputStatistics.distance`, where there is something to gather.
        gather: also return moments.
        training: use the margin of training.

    Returns:
        Distances, float32, shape (n_tokens,), zeros while nothing yields; and the moments as one
        vector, padded with zeros, of no elements where none are asked for.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    size = statistics.most_moments if gather else 0
    return torch.ops.budwood.slim_distance(flat, keep, statistics.handle, size, training)


def last_in_graph(statistics: Any, x: Tensor) -> Tensor:
    """Return the distances that the first layer of a block has measured in this graph.

    Args:
        statistics: of the first layer.
        x: input of the last layer, shape (…, d_in). It is made of what the first layer returned, so
            that the graph has the two in order.

    Returns:
        Shape (n_tokens,); zeros where there are none for as many tokens.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    return torch.ops.budwood.slim_last_distance(flat, statistics.handle)


def used_in_graph(
    handle: Tensor,
    weight: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    moments: Tensor | None,
    n_masked: int,
    slope: float,
    adapter: str,
    counts: bool,
) -> Tensor:
    """Return a weight as a pass inside a graph uses it; see :class:`Side`.

    Args:
        handle: of the layer.
        weight: shape (…, d_out, d_in).
        columns: as of ``Side``.
        rows: as of ``Side``.
        moments: of this pass, for A; None for B.
        n_masked: as of ``Side``.
        slope: as of ``Side``.
        adapter: name of the adapter.
        counts: the backward pass counts, and its moments are noted.
    """
    return torch.ops.budwood.slim_used(
        weight, columns, rows, moments, handle, n_masked, slope, adapter, counts
    )


def _distance(
    x: Tensor, keep: Tensor | None, handle: Tensor, size: int, training: bool
) -> tuple[Tensor, Tensor]:
    statistics: Any = _OBJECTS[int(handle)]
    distance, moments = statistics.measured(x, keep, gather=size > 0, training=training)
    flat = x.new_zeros(size, dtype=torch.float32)
    if moments is not None:
        values = moments.flat()
        flat[: len(values)] = values
    if distance is None:
        distance = x.new_zeros(len(x), dtype=torch.float32)
    statistics.in_graph.set(distance.clone())  # the graph may use the memory again
    return distance, flat


def _last_distance(x: Tensor, handle: Tensor) -> Tensor:
    last = _OBJECTS[int(handle)].in_graph.get()
    if last is None or len(last) != len(x):
        return x.new_zeros(len(x), dtype=torch.float32)
    return last.clone()


def _last_distance_shape(x: Tensor, handle: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _distance_shapes(
    x: Tensor, keep: Tensor | None, handle: Tensor, size: int, training: bool
) -> tuple[Tensor, Tensor]:
    new = x.new_empty
    return new(x.shape[0], dtype=torch.float32), new(size, dtype=torch.float32)


def _used(weight: Tensor, *how: Any) -> Tensor:
    used = _side(*how).masked(weight)
    return used.clone() if used is weight else used


def _settle(grad: Tensor, weight: Tensor, *how: Any) -> Tensor:
    grad = grad.clone(memory_format=torch.contiguous_format)
    _side(*how).settle(grad, weight)
    return grad


def _side(
    columns: Tensor | None,
    rows: Tensor | None,
    moments: Tensor | None,
    handle: Tensor,
    n_masked: int,
    slope: float,
    adapter: str,
    counts: bool,
) -> Side:
    def on_backward() -> bool:
        layer: Noting = _OBJECTS[int(handle)]
        return counts and layer.noted(adapter, moments)

    return Side(columns, rows, n_masked, slope, on_backward)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.how = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_weight = torch.ops.budwood.slim_settle(grad, *ctx.saved_tensors, *ctx.how)
    return of_weight, *(None,) * 8


def _like_first(first: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _define(name: str, schema: str, run: Any, shapes: Any) -> None:
    name = f"budwood::{name}"
    torch.library.custom_op(name, run, mutates_args=(), schema=schema)
    torch.library.register_fake(name, shapes)


_WEIGHT = (
    "Tensor weight, Tensor? columns, Tensor? rows, Tensor? moments, Tensor handle, "
    "int n_masked, float slope, str adapter, bool counts"
)
_define(
    "slim_distance",
    "(Tensor x, Tensor? keep, Tensor handle, int size, bool training) -> (Tensor, Tensor)",
    _distance,
    _distance_shapes,
)
_define(
    "slim_last_distance",
    "(Tensor x, Tensor handle) -> Tensor",
    _last_distance,
    _last_distance_shape,
)
_define("slim_used", f"({_WEIGHT}) -> Tensor", _used, _like_first)
_define("slim_settle", f"(Tensor grad, {_WEIGHT}) -> Tensor", _settle, _like_first)
torch.library.register_autograd("budwood::slim_used", _backward, setup_context=_remember)
