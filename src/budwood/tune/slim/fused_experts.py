"""SLIM on the fused experts of a mixture-of-experts model.

transformers keeps the routed experts of a block as two weights of shape (n_parts, d_out, d_in):
``gate_up_proj``, or ``up_proj`` in experts without a gate, and ``down_proj``. Each slice of a
weight is a linear layer that some of the tokens go through, and gets what SLIM gives any linear
layer: LoRA and identity experts, and a router. To tell the two mixtures apart, the base model's
experts are called *parts* here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations import moe

from budwood.errors import UnsupportedModelError
from budwood.tune.equations import surely_bypassed
from budwood.tune.slim.adapter_names import groups, owners
from budwood.tune.slim.autograd import Side, used
from budwood.tune.slim.clustering import Moments
from budwood.tune.slim.keeper import Routing, StepKeeper
from budwood.tune.slim.layer import SlimLinear, skips_bypassed
from budwood.tune.slim.passes import Pass

FIRST = ("gate_up_proj", "up_proj")
LAST = "down_proj"
_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate", LAST)
"""Attributes of experts whose forward pass transformers can replace."""
_OPS = torch.ops.transformers
_ALIGNED = 16
"""Bytes that the rows of a grouped product's matrices are multiples of."""


@dataclass(frozen=True)
class Dispatch:
    """How tokens go to the parts of a block: pairs of token and part, sorted by part.

    Attributes:
        order: place of each sorted pair among the pairs as they came, int64, shape (n_pairs,).
        token: of each pair, int64, shape (n_pairs,).
        part: of each pair, int64, shape (n_pairs,).
        ends: number of pairs up to and with each part, int32, shape (n_parts,).
    """

    order: Tensor
    token: Tensor
    part: Tensor
    ends: Tensor

    @classmethod
    def of(cls, index: Tensor, n_parts: int) -> Dispatch:
        """Sort the pairs of the base model's choice, int64, shape (n_tokens, top_k)."""
        part, order = torch.sort(index.reshape(-1))
        # As transformers counts them: on a CPU histc takes floating-point numbers alone.
        counted = part.float() if part.device.type in ("cpu", "mps") else part.int()
        counts = torch.histc(counted, bins=n_parts, min=0, max=n_parts - 1)
        return cls(order, order // index.shape[-1], part, counts.cumsum(0, dtype=torch.int32))

    def summed(self, pairs: Tensor, n_tokens: int) -> Tensor:
        """Add up the pairs of each token: shape (n_pairs, d) → (n_tokens, d)."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place), device=place.device)
        return pairs[place].view(n_tokens, -1, pairs.shape[-1]).sum(1)


@dataclass(frozen=True)
class _Mixture:
    """What one adapter adds to one weight in one pass.

    Attributes:
        layer: of the weight.
        now: the pass.
        distance: of the tokens, shape (n_tokens,); None without yielding.
        moments: to gather; None where another layer does.
    """

    layer: SlimExperts
    now: Pass
    distance: Tensor | None
    moments: Moments | Tensor | None


class SlimExperts(SlimLinear):
    """SLIM beside one of the two weights of a block's fused experts.

    The layer of ``down_proj`` is around that of the first weight, which is around the base model's
    module; the outer one runs everything. Both weights yield by the distance of the block's input,
    whatever ``yield_at`` says. The operations and their order are those of transformers'
    ``grouped_mm``, its default: with it, a token that bypasses gets the base model's output bit for
    bit. With another implementation it gets that up to rounding.

    Args:
        base_layer: the experts' module, or the layer of the other weight around it.
        keeper: of the model.
        key: name of the weight in the model.
    """

    def __init__(self, base_layer: nn.Module, keeper: StepKeeper, key: str) -> None:
        self.parameter_name = key.rpartition(".")[2]
        super().__init__(base_layer, keeper, key)
        self.stack = (self.fused.num_experts,)

    @property
    def fused(self) -> Any:
        """The base model's module."""
        return self.get_base_layer()

    def layers(self) -> list[SlimExperts]:
        """The layers of both weights, in the order in which tokens go through them."""
        inner = self.base_layer.layers() if isinstance(self.base_layer, SlimExperts) else []
        return [*inner, self]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        adapter_names: list[str] | None = None,
    ) -> Tensor:
        """Run the experts of a block.

        Args:
            x: shape (n_tokens, d).
            index: parts that the base model's router chose, int64, shape (n_tokens, top_k).
            weights: the router's weights, of the same shape.
            adapter_names: one for each row of the batch; None for the active adapters.
        """
        layers = self.layers()
        known = {name for layer in layers for name in layer.slim_in}
        names = [name for name in self.active_adapters if name in known]
        if adapter_names is None and names and not self.disable_adapters and not self._surveyed(x):
            return self._run(x, index, weights, names)
        result = self.fused(x, index, weights)
        if adapter_names is None or self.disable_adapters:
            return result
        owner = owners(x, adapter_names, self.slim_key)
        for name, numbers in groups(adapter_names, known).items():
            rows = torch.isin(owner, torch.tensor(numbers, device=x.device)).nonzero().squeeze(-1)
            part = self._run(x[rows], index[rows], weights[rows], [name], (x, rows))
            result = result.index_copy(0, rows, part)
        return result

    def _surveyed(self, x: Tensor) -> bool:
        """Show the input to the survey, if there is one."""
        if self.keeper.survey is None:
            return False
        for layer in self.layers():
            layer._show(x)
        return True

    def _run(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        names: Sequence[str],
        part: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Run the experts with some adapters; the arguments are those of :meth:`forward`."""
        fused, layers = self.fused, self.layers()
        mixtures = [
            _Mixture(layer, now, *layer._distance(x, now))
            for layer in layers
            for name in names
            if name in layer.slim_in
            for now in [layer._begin(name, part)]
        ]
        if _all_bypass(x, mixtures):
            for one in mixtures:
                one.layer._record_bypass(one.now, x, one.distance)
            return fused(x, index, weights)
        pairs = Dispatch.of(index, fused.num_experts)
        hidden = x[pairs.token]
        for layer in layers:
            out = _base_product(fused, layer.parameter_name, hidden, pairs)
            for one in mixtures:
                if one.layer is layer:
                    out = layer._with_pairs(out, hidden, x, pairs, one)
            hidden = out if layer.parameter_name == LAST else _activated(fused, out)
        if getattr(fused, "has_post_expert_norm", False):
            hidden = fused.post_expert_norm(hidden)
        hidden = hidden * weights.reshape(-1)[pairs.order].unsqueeze(-1)
        return pairs.summed(hidden, len(x)).to(x.dtype)

    def _with_pairs(
        self, out: Tensor, hidden: Tensor, x: Tensor, pairs: Dispatch, mixture: _Mixture
    ) -> Tensor:
        """Add an adapter's experts to the output of all pairs, shape (n_pairs, d_out)."""
        now, distance = mixture.now, mixture.distance
        a, b, side_in, side_out = self._used(now, mixture.moments)
        times = functools.partial(_times, ends=pairs.ends)
        near = None if distance is None else distance[pairs.token]
        h, weights = self._route(hidden, a, now, side_in, near, times)
        if self.keeper.recorder is not None:
            keep = self._recorded_tokens(now, x)
            keep = None if keep is None else keep[pairs.token]
            place = (self.slim_key, now.name)
            self.keeper.recorder.add(
                Routing(*place, now.config, weights, None, near, keep, len(weights))
            )
        h = self._weighted(h, weights[:, : now.config.n_experts], now)
        return out + times(h, b, side_out).to(out.dtype)

    def _sizes(self) -> tuple[int, int]:
        shape = getattr(self.fused, self.parameter_name).shape[1:]
        d_in, d_out = shape if self.fused.is_transposed else reversed(shape)
        return int(d_in), int(d_out)

    def _measured_channels(self) -> int:
        return self.layers()[0].in_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        weight = getattr(base_layer, self.parameter_name)
        return weight.device, weight.dtype


def around(experts: nn.Module, keeper: StepKeeper, key: str) -> SlimExperts:
    """Make the layers of both weights around a module of fused experts; returns the outer one.

    Args:
        experts: for which :func:`why_not` returned None.
        keeper: of the model.
        key: name of the module in the model.
    """
    layer = experts
    for name in weights_of(experts):
        layer = SlimExperts(layer, keeper, f"{key}.{name}")
    return layer  # type: ignore[return-value]


def weights_of(experts: nn.Module) -> list[str]:
    """Names of the weights of fused experts, in the order in which tokens go through them."""
    return [name for name in (*FIRST, LAST) if name in experts._parameters]


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of routed experts by itself, in whatever form."""
    if isinstance(module, SlimExperts):
        return True
    own = [*module._parameters.values(), *module._buffers.values()]
    return "expert" in type(module).__name__.lower() and any(
        value is not None and value.ndim > 1 for value in own
    )


def why_not(module: nn.Module) -> str | None:
    """Say why SLIM cannot adapt some fused experts; None if it can."""
    kind = type(module).__name__
    if not hasattr(moe, "_grouped_linear") or not hasattr(_OPS, "grouped_mm_fallback"):
        return f"transformers {transformers.__version__} runs {kind} in a way of its own"
    if not all(hasattr(module, mark) for mark in _MARKS) or len(weights_of(module)) != 2:
        return f"{kind} keeps its experts in a form of its own"
    tensors = [getattr(module, name) for name in weights_of(module)]
    if any(one.ndim != 3 or one.dtype not in _DTYPES for one in tensors):
        return f"the experts in {kind} are quantised"
    if getattr(module, "_is_expert_parallel", False):
        return f"the experts in {kind} are spread over devices"
    return None


def check_fused(module: nn.Module, key: str) -> None:
    """Refuse fused experts that SLIM cannot adapt.

    Raises:
        UnsupportedModelError: with the reason and what to do.
    """
    reason = None if isinstance(module, SlimExperts) else why_not(module)
    if reason is not None:
        raise UnsupportedModelError(
            f"{key!r}: {reason}, which SLIM does not adapt; name the linear layers to adapt "
            "instead, such as those of attention: SlimConfig(target_modules=[...])"
        )


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _all_bypass(x: Tensor, mixtures: Sequence[_Mixture]) -> bool:
    """Whether no token of a pass without gradients can reach a LoRA expert, where that is cheap."""
    if not skips_bypassed(x) or any(one.now.gather for one in mixtures):
        return False
    for one in mixtures:
        config, distance = one.now.config, one.distance
        if distance is None:
            return False
        sure = surely_bypassed(
            distance, config.n_experts, config.n_identity, config.kept, config.beta
        )
        if sure is None or not bool(sure.all()):
            return False
    return True


def _base_product(fused: Any, name: str, x: Tensor, pairs: Dispatch) -> Tensor:
    """The base model's projection of all pairs."""
    bias = getattr(fused, f"{name}_bias")[pairs.part] if fused.has_bias else None
    weight = getattr(fused, name)
    return moe._grouped_linear(x, weight, pairs.ends, bias, is_transposed=fused.is_transposed)


def _activated(fused: Any, out: Tensor) -> Tensor:
    return fused._apply_gate(out) if fused.has_gate else fused.act_fn(out)


def _times(x: Tensor, weight: Tensor, side: Side | None, *, ends: Tensor) -> Tensor:
    """The product x·Wᵀ of each pair with the slice of its part."""
    weight = used(weight, side)
    sizes = [size * weight.element_size() for size in weight.shape[1:]]
    if any(size % _ALIGNED for size in sizes):  # such rows the kernels refuse
        return _OPS.grouped_mm_fallback(x.to(weight.dtype), weight.transpose(-2, -1), ends)
    return moe._grouped_linear(x, weight, ends)
