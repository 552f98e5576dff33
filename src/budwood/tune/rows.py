"""Some tokens of a batch: taken out, and added back, without a gradient of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.n = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (rows,) = ctx.saved_tensors
        if not len(rows):
            return None, None
        return grad.new_zeros(ctx.n, *grad.shape[1:]).index_copy_(0, rows, grad), None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.mark_dirty(result)
        result.view(-1, result.shape[-1]).index_add_(0, rows, delta)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad, grad.reshape(-1, grad.shape[-1]).index_select(0, rows), None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of x that are named, shape (n_rows, …).

    Where none is named, x gets no gradient, in place of zeros of its size.

    Args:
        x: shape (n_tokens, …).
        rows: indices, int64, shape (n_rows,), each at most once.
    """
    return _Taken.apply(x, rows)  # type: ignore[return-value]


def add_rows(result: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
    """Add to some rows, in place where the memory of ``result`` allows it.

    Args:
        result: shape (…, d); its leading dimensions count as one.
        delta: shape (n_rows, d), of the dtype of ``result``.
        rows: as of :func:`take_rows`.
    """
    if result.is_contiguous():
        return _Added.apply(result, delta, rows)  # type: ignore[return-value]
    flat = result.reshape(-1, result.shape[-1])
    return flat.index_add(0, rows, delta).view(result.shape)
