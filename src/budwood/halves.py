"""Half precision on CPUs: which of them multiply it, and how to do without."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def multiplies(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether a device multiplies matrices of a dtype itself.

    A CPU without AVX-512 has no products in bfloat16, and few CPUs have them in float16. PyTorch
    then takes eight to nine times as long as in float32. Other devices are taken to have both.

    Args:
        dtype: of the matrices.
        device: a torch device or its name.
    """
    if dtype not in (torch.bfloat16, torch.float16) or torch.device(device).type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():  # its operators are missing then
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def fast_half(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 if a device multiplies it itself, else float32."""
    return torch.bfloat16 if multiplies(torch.bfloat16, device) else torch.float32


class RoundedLinear(nn.Linear):
    """A linear layer in bfloat16 that multiplies in float32 and rounds the result.

    Processors with bfloat16 products do the same, so values agree up to the order of summation.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as in nn.Linear
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
        if type(module) is nn.Linear and not multiplies(torch.bfloat16, module.weight.device):
            module.__class__ = RoundedLinear
