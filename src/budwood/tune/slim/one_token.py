"""One token at a time, as in generation with a KV cache, on a CPU.

A pass of one token costs what its operations take to start, and not what they compute. So the few
values of the router are read out once, and go through :func:`budwood.tune.equations.route_one` as
plain numbers, like the distance. The results are those of :mod:`budwood.tune.slim.layer`, up to
the rounding of float32. Nothing is kept from token to token but what the statistics keep, so that
weights may change at any time.
"""

from __future__ import annotations

from array import array

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.tune.config import SlimConfig
from budwood.tune.equations import bypass_bound, route_one


def is_one_token(x: Tensor) -> bool:
    """Whether a layer's input, shape (…, d_in), is one token on a CPU, outside training."""
    return (
        not torch.compiler.is_compiling()  # first, so that a graph is not tied to a length
        and x.numel() == x.shape[-1]
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def takes(config: SlimConfig, a: Tensor, b: Tensor) -> bool:
    """Whether :func:`hidden_of_one` is made for an adapter with this config and these weights."""
    plain = config.router and not config.expert_bias and config.merge_inference != "mask"
    return plain and a.dtype == b.dtype == torch.float32


def bypasses(distance: float, config: SlimConfig) -> bool:
    """Whether no router output could bring a token at this distance to a LoRA expert."""
    counts = config.n_experts, config.n_identity, config.top_k
    return distance > bypass_bound(*counts, config.beta)


def hidden_of_one(
    x: Tensor, a: Tensor, distance: float, config: SlimConfig, scale: float
) -> Tensor | None:
    """Compute what B is applied to, for one token.

    Args:
        x: input of the layer, shape (…, d_in).
        a: A above the router, shape (rank + n_experts + n_identity, d_in).
        distance: d of the token; 0 without yielding.
        config: of the adapter.
        scale: factor on the experts' output.

    Returns:
        Hidden values times routing weights and scale, shape (rank,); None if the token bypasses.
    """
    n, r = config.n_experts, config.r
    hidden = F.linear(x if x.dtype == a.dtype else x.to(a.dtype), a).view(-1).tolist()
    weights = route_one(hidden[n * r :], distance, n, config.top_k, config.beta)
    if not weights:
        return None
    weighted = [0.0] * (n * r)
    for expert, weight in weights.items():
        start, factor = expert * r, weight * scale
        weighted[start : start + r] = [factor * value for value in hidden[start : start + r]]
    return torch.frombuffer(array("f", weighted), dtype=torch.float32)
