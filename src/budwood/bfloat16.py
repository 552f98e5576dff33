"""Products of matrices in bfloat16 on a CPU: whether it has them, and how to do without them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether a device multiplies bfloat16 matrices itself.

    A CPU without AVX-512 does not. PyTorch then takes eight to nine times as long as in float32.
    Every other device is taken to have them.
    """
    if torch.device(device).type != "cpu":
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class RoundedLinear(nn.Linear):
    """A linear layer in bfloat16 that multiplies in float32 and rounds the result.

    Processors with bfloat16 products do the same, so values agree up to the order of summation.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(input.float(), self.weight.float(), bias).to(input.dtype)


def round_products(model: nn.Module) -> None:
    """Let the linear layers of a model be :class:`RoundedLinear`, where that saves time.

    A comparison in bfloat16 can then go on on a CPU without bfloat16 products. On other devices
    nothing changes.

    Args:
        model: changed in place; layers of subclasses of ``nn.Linear`` stay.
    """
    for module in model.modules():
        if type(module) is nn.Linear and not has_bfloat16(module.weight.device):
            module.__class__ = RoundedLinear
