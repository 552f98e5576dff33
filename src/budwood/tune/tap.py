"""What happens to a layer's weights on their way into a training step, and to their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Plan:
    """One forward pass of one layer.

    Attributes:
        rank: rows of ``slim_in`` that are A; the rest is the router.
        columns: columns of A that stay, bool (d_in,); None for all.
        rows: rows of B that stay, bool (d_out,); None for all.
        slopes: of the L1 penalty, for A and B.
        on_backward: called once per backward pass; says whether the penalty is due.
    """

    rank: int
    columns: Tensor | None
    rows: Tensor | None
    slopes: tuple[float, float]
    on_backward: Callable[[], bool]


class Tap(torch.autograd.Function):
    """Masked weights in forward; masked gradients, penalty and bookkeeping in backward.

    Backward runs once for each pass that counts, while gradient checkpointing runs forward twice.
    That makes it the place to take up statistics. The gradient of the L1 penalty goes in here as
    well, once per optimiser step: it needs no help from the training loop, can't be forgotten, and
    does not depend on gradient accumulation or on how the loss is computed. Deviation: it is not
    multiplied by a float16 loss scale.
    """

    @staticmethod
    def forward(ctx: Any, slim_in: Tensor, slim_out: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if any(plan.slopes):
            ctx.save_for_backward(slim_in, slim_out)
        if plan.columns is None or plan.rows is None:
            return slim_in.view_as(slim_in), slim_out.view_as(slim_out)
        a = slim_in.clone()
        a[: plan.rank].mul_(plan.columns)
        return a, slim_out * plan.rows.unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_in: Tensor | None, grad_out: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        plan: Plan = ctx.plan
        due = plan.on_backward() and any(plan.slopes)
        # Once: gradient checkpointing lets saved tensors be unpacked no second time.
        slim_in, slim_out = ctx.saved_tensors if due else (None, None)
        if grad_in is not None and (due or plan.columns is not None):
            grad_in = grad_in.clone()
            if plan.columns is not None:
                grad_in[: plan.rank].mul_(plan.columns)
            if slim_in is not None:
                a = slim_in[: plan.rank]
                grad_in[: plan.rank].add_(a.sign(), alpha=plan.slopes[0])
        if grad_out is not None and plan.rows is not None:
            grad_out = grad_out * plan.rows.unsqueeze(-1)
        if grad_out is not None and slim_out is not None:
            grad_out = torch.add(grad_out, slim_out.sign(), alpha=plan.slopes[1])
        return grad_in, grad_out, None
