"""Products with a layer's weights in training: masked, penalised, and counted in backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Side:
    """One of a layer's two weights in one forward pass.

    Attributes:
        columns: columns that stay, bool (d_in,), in the first ``n_masked`` rows; None for all.
        rows: rows that stay, bool (d_out,); None for all.
        n_masked: rows whose columns are masked and which are penalised.
        slope: of the L1 penalty.
        on_backward: called once per backward pass; says whether the penalty is due.
    """

    columns: Tensor | None
    rows: Tensor | None
    n_masked: int
    slope: float
    on_backward: Callable[[], bool]

    def masked(self, weight: Tensor) -> Tensor:
        """The weight as it is used."""
        if self.columns is not None:
            weight = weight.clone()
            weight[: self.n_masked].mul_(self.columns)
        return weight if self.rows is None else weight * self.rows.unsqueeze(-1)

    def settle(self, grad: Tensor, weight: Tensor) -> None:
        """Mask the gradient of the weight, in place, and add that of the penalty if it is due."""
        if self.columns is not None:
            grad[: self.n_masked].mul_(self.columns)
        if self.rows is not None:
            grad.mul_(self.rows.unsqueeze(-1))
        if self.on_backward() and self.slope:
            part = slice(self.n_masked)
            grad[part].add_(weight[part].sign(), alpha=self.slope)


class Product(torch.autograd.Function):
    """The product x·Wᵀ, on top of a base; W is masked on its way in, its gradient on its way out.

    Masks are applied again in backward, so that no masked copy is kept between the two.

    Backward runs once for each pass that counts, while gradient checkpointing runs forward twice.
    That makes it the place to take up statistics. The gradient of the L1 penalty goes in here as
    well, once per optimiser step: it needs no help from the training loop, can't be forgotten, and
    does not depend on gradient accumulation or on how the loss is computed. Deviation: it is not
    multiplied by a float16 loss scale.
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
        # Once: gradient checkpointing lets saved tensors be unpacked no second time.
        x, weight = ctx.saved_tensors
        side: Side = ctx.side
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad.T @ x.to(grad.dtype)).to(weight.dtype)
            side.settle(of_weight, weight)
        if ctx.needs_input_grad[0]:
            of_x = (grad @ side.masked(weight).to(grad.dtype)).to(x.dtype)
        return of_x, of_weight, grad if ctx.has_base else None, None


class Untouched(torch.autograd.Function):
    """The output of a pass in which no token reaches an expert; what backward counts, it counts."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, a: Tensor, b: Tensor, *sides: Side | None) -> Tensor:
        ctx.sides = sides
        ctx.save_for_backward(a, b)
        return result.detach()  # the same memory, and unlike a view it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_result: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors  # once, as in Product
        of_weights: list[Tensor | None] = [None, None]
        for i in (1, 0):  # B before A, as in a pass with tokens
            if ctx.needs_input_grad[1 + i]:
                of_weights[i] = grad = torch.zeros_like(weights[i])
                if ctx.sides[i] is not None:
                    ctx.sides[i].settle(grad, weights[i])
        return of_result, *of_weights, None, None


def product(x: Tensor, weight: Tensor, side: Side | None, base: Tensor | None = None) -> Tensor:
    """The product x·Wᵀ, on top of a base where there is one.

    Args:
        x: shape (n_tokens, d_in).
        weight: W, shape (d_out, d_in).
        side: how the weight is used in training; None for plainly.
        base: shape (n_tokens, d_out), of the dtype of x and W; None for nothing.
    """
    if side is not None:
        return Product.apply(x, weight, base, side)  # type: ignore[return-value]
    return F.linear(x, weight) if base is None else torch.addmm(base, x, weight.T)


def untouched(
    result: Tensor, a: Tensor, b: Tensor, side_a: Side | None, side_b: Side | None
) -> Tensor:
    """A layer's output where no token reaches an expert.

    Args:
        result: output of the base layer, shape (…, d_out); its values are returned.
        a: A and the router, whose gradient is that of the penalty.
        b: B, likewise.
        side_a: as of :func:`product`, for A.
        side_b: likewise for B.
    """
    if not torch.is_grad_enabled() or not (a.requires_grad or b.requires_grad):
        return result
    return Untouched.apply(result, a, b, side_a, side_b)  # type: ignore[return-value]
