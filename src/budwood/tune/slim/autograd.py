"""Autograd functions of a SLIM layer: masked and penalised products, and some rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# --- Products ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """How one forward pass uses one of a layer's two weights, of shape (…, d_out, d_in).

    Attributes:
        columns: columns that stay in the first ``n_masked`` rows, bool (d_in,); None for all.
        rows: rows that stay, bool (d_out,); None for all.
        n_masked: number of rows whose columns are masked and which are penalised.
        slope: of the L1 penalty.
        on_backward: called once per backward pass; returns whether the penalty is due.
    """

    columns: Tensor | None
    rows: Tensor | None
    n_masked: int
    slope: float
    on_backward: Callable[[], bool]

    def masked(self, weight: Tensor) -> Tensor:
        """Apply the masks to the weight."""
        if self.columns is not None:
            weight = weight.clone()
            weight[..., : self.n_masked, :].mul_(self.columns)
        return weight if self.rows is None else weight * self.rows.unsqueeze(-1)

    def settle(self, grad: Tensor, weight: Tensor) -> None:
        """Mask the gradient of the weight, in place, and add that of the penalty if it is due."""
        if self.columns is not None:
            grad[..., : self.n_masked, :].mul_(self.columns)
        if self.rows is not None:
            grad.mul_(self.rows.unsqueeze(-1))
        if self.on_backward() and self.slope:
            part = (..., slice(self.n_masked), slice(None))
            grad[part].add_(weight[part].sign(), alpha=self.slope)


class Product(torch.autograd.Function):
    """The product x·Wᵀ, added to a base; W is masked in forward, its gradient in backward.

    Backward applies the masks again, so that no masked copy of W is kept between the two.

    Backward runs once for each pass that counts, while gradient checkpointing runs forward twice.
    So statistics are gathered in backward. The gradient of the L1 penalty is added here as well,
    once per optimiser step: it needs nothing from the training loop, and does not depend on
    gradient accumulation or on how the loss is computed. Deviation: a float16 loss scale does not
    apply to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, base: Tensor | None, side: Side) -> Tensor:
        ctx.side, ctx.has_base = side, base is not None
        ctx.save_for_backward(x, weight)
        used = side.masked(weight)
        return F.linear(x, used) if base is None else torch.addmm(base, x, used.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # read once: checkpointing unpacks them only once
        side: Side = ctx.side
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad.T @ x.to(grad.dtype)).to(weight.dtype)
            side.settle(of_weight, weight)
        if ctx.needs_input_grad[0]:
            of_x = (grad @ side.masked(weight).to(grad.dtype)).to(x.dtype)
        return of_x, of_weight, grad if ctx.has_base else None, None


class Used(torch.autograd.Function):
    """W as one pass uses it: masked in forward, its gradient in backward, which counts as Product.

    For products that are not our own, such as those of fused experts.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, side: Side) -> Tensor:
        ctx.side = side
        ctx.save_for_backward(weight)
        used = side.masked(weight)
        return used if used is not weight else weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors  # read once, as in Product
        grad = grad.clone(memory_format=torch.contiguous_format)  # another node may hold it
        ctx.side.settle(grad, weight)
        return grad, None


class Untouched(torch.autograd.Function):
    """The base output of a pass in which every token bypasses; backward counts as in Product."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, a: Tensor, b: Tensor, *sides: Side | None) -> Tensor:
        ctx.sides = sides
        ctx.save_for_backward(a, b)
        return result.detach()  # the same memory; unlike a view, it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_result: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors  # read once, as in Product
        of_weights: list[Tensor | None] = [None, None]
        for i in (1, 0):  # B before A, as in a pass with tokens
            if ctx.needs_input_grad[1 + i]:
                of_weights[i] = grad = torch.zeros_like(weights[i])
                if ctx.sides[i] is not None:
                    ctx.sides[i].settle(grad, weights[i])
        return of_result, *of_weights, None, None


def used(weight: Tensor, side: Side | None) -> Tensor:
    """Return a weight as one pass uses it.

    Args:
        weight: shape (…, d_out, d_in).
        side: masks and penalty; None for the weight as it is.
    """
    return weight if side is None else Used.apply(weight, side)  # type: ignore[return-value]


def product(x: Tensor, weight: Tensor, side: Side | None, base: Tensor | None = None) -> Tensor:
    """Compute x·Wᵀ, added to a base where there is one.

    Args:
        x: shape (n_tokens, d_in).
        weight: W, shape (d_out, d_in).
        side: how W is used in training; None for a plain product.
        base: shape (n_tokens, d_out), of the dtype of x and W; None for zeros.

    Returns:
        Shape (n_tokens, d_out).
    """
    if side is not None:
        return Product.apply(x, weight, base, side)  # type: ignore[return-value]
    return F.linear(x, weight) if base is None else torch.addmm(base, x, weight.T)


def untouched(
    result: Tensor, a: Tensor, b: Tensor, side_a: Side | None, side_b: Side | None
) -> Tensor:
    """Return a base layer's output as it is, for a pass in which every token bypasses.

    Args:
        result: output of the base layer, shape (…, d_out).
        a: A and the router; its gradient is that of the penalty.
        b: B, likewise.
        side_a: as for :func:`product`, for A.
        side_b: likewise for B.
    """
    if not torch.is_grad_enabled() or not (a.requires_grad or b.requires_grad):
        return result
    return Untouched.apply(result, a, b, side_a, side_b)  # type: ignore[return-value]


# --- Some rows of a batch ---------------------------------------------------------------------


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
    """Select rows of x. With none selected, x gets no gradient instead of zeros.

    Args:
        x: shape (n_tokens, …).
        rows: indices, int64, shape (n_rows,), each at most once.

    Returns:
        Shape (n_rows, …).
    """
    return _Taken.apply(x, rows)  # type: ignore[return-value]


def add_rows(result: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
    """Add to some rows, in place where ``result`` is contiguous.

    Args:
        result: shape (…, d); its leading dimensions count as one.
        delta: shape (n_rows, d), of the dtype of ``result``.
        rows: as for :func:`take_rows`.
    """
    if result.is_contiguous():
        return _Added.apply(result, delta, rows)  # type: ignore[return-value]
    flat = result.reshape(-1, result.shape[-1])
    return flat.index_add(0, rows, delta).view(result.shape)
