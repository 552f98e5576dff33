"""The same mixture as a loop over experts, each with layers of its own: for comparison only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budwood.tune.equations import route, standardise


class LoopedExperts(nn.Module):
    """A frozen linear layer with LoRA experts that are run one after the other.

    Args:
        base: the frozen layer.
        r: rank of one expert.
        n_experts: LoRA experts.
        n_identity: identity experts.
        top_k: experts kept.
        scale: factor on the experts' output.
    """

    def __init__(
        self, base: nn.Linear, r: int, n_experts: int, n_identity: int, top_k: int, scale: float
    ) -> None:
        super().__init__()
        self.base = base
        self.top_k, self.scale = top_k, scale
        d_in, d_out = base.in_features, base.out_features
        self.router = nn.Linear(d_in, n_experts + n_identity, bias=False)
        self.a = nn.ModuleList(nn.Linear(d_in, r, bias=False) for _ in range(n_experts))
        self.b = nn.ModuleList(nn.Linear(r, d_out, bias=False) for _ in range(n_experts))
        for one in self.b:
            nn.init.zeros_(one.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result = self.base(flat)
        weights = route(standardise(F.linear(flat, self.router.weight).float()), self.top_k)
        for i, (a, b) in enumerate(zip(self.a, self.b)):
            rows = (weights[:, i] > 0).nonzero().squeeze(-1)
            own = b(a(flat[rows])) * (self.scale * weights[rows, i]).unsqueeze(-1).to(x.dtype)
            result = torch.index_add(result, 0, rows, own)
        return result.view(*x.shape[:-1], -1)
