"""A frozen linear layer with a mixture of LoRA and identity experts beside it.

:mod:`budwood.tune.equations` has the equations; this module applies them to the tokens of a pass.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from budwood.errors import MergeError
from budwood.tune.autograd import Side, add_rows, product, take_rows, untouched
from budwood.tune.config import SlimConfig
from budwood.tune.equations import (
    l1_slopes,
    merged_scale,
    route,
    standardise,
    surely_bypassed,
    yield_scores,
)
from budwood.tune.moments import Moments
from budwood.tune.state import InputStatistics, Mask, make_statistics
from budwood.tune.steps import Routing, SlimLayer, StepKeeper
from budwood.tune.tokens import TokenWatch

SKIP_FROM = 0.25
"""Fraction of bypassed tokens from which only the others go through B."""
REFUSAL = (
    "SLIM chooses experts token by token, which no single weight can stand for: keep the adapter "
    "beside the model, or write an approximate LoRA with budwood.tune.export_lora"
)


@dataclass(frozen=True)
class _Pass:
    """One forward pass of one adapter.

    Attributes:
        name: of the adapter.
        config: of the adapter.
        training: it is a pass of training; reentrant checkpointing begins these without gradients.
        gather: it has gradients, so that statistics are gathered in its backward pass.
        masked: a mask of dynamic merging is in force.
    """

    name: str
    config: SlimConfig
    training: bool
    gather: bool
    masked: bool


class Weight(nn.Module):
    """Holds one matrix, as a ``Linear`` without bias does.

    Args:
        weight: shape (rows, columns).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass(frozen=True, eq=False)
class SharedStatistics:
    """Statistics that another layer holds.

    Attributes:
        statistics: of the other layer.
        follows: the other layer begins the block that this one ends, and reads another input.
    """

    statistics: InputStatistics
    follows: bool


class SlimLinear(SlimLayer):
    """SLIM beside a linear layer, quantised or not.

    Source: SLIM: y = W·x + b + Σ_i ŵ_i·f_i(x), with f_i(x) = B_i·A_i·x for LoRA experts and 0 for
    identity experts. All A and the router are one matrix product and all B another, with the
    routing weights on the rank axis between them. A token without weight on any LoRA expert gets
    exactly the base layer's output.

    Args:
        base_layer: the frozen layer.
        keeper: of the model.
        key: name of the layer in the model.
    """

    def __init__(self, base_layer: nn.Module, keeper: StepKeeper, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.slim_in = nn.ModuleDict()
        self.slim_out = nn.ModuleDict()
        self.slim_clusters = nn.ModuleDict()
        self.slim_mask = nn.ModuleDict()
        self.shared_statistics: dict[str, SharedStatistics] = {}
        self.slim_config = {}
        self.slim_key = key
        self.keeper = keeper
        self.watch: TokenWatch | None = None
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, name: str, config: SlimConfig, shared: SharedStatistics | None) -> None:
        """Add an adapter.

        Args:
            name: of the adapter.
            config: of the adapter.
            shared: statistics that another layer holds; None to hold its own.
        """
        d_in, d_out = int(self.in_features or 0), int(self.out_features or 0)
        self.slim_config[name] = config
        n_rows = config.rank + (config.n_total if config.router else 0)
        # As for LoRA: A uniform within ±1/√d_in, B zero. The router's scale does not matter.
        slim_in = torch.empty(n_rows, d_in)
        nn.init.kaiming_uniform_(slim_in, a=math.sqrt(5))
        self.slim_in[name] = Weight(slim_in)
        self.slim_out[name] = Weight(torch.zeros(d_out, config.rank))
        if config.merging and config.merge_p > 0:
            self.slim_mask[name] = Mask(config, d_in, d_out, self.slim_key)
        if config.yielding and shared is not None:
            self.shared_statistics[name] = shared
        elif config.yielding:
            self.slim_clusters[name] = make_statistics(config, d_in, self.slim_key)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def statistics(self, name: str) -> InputStatistics | None:
        """An adapter's statistics of the input, held here or shared; None without yielding."""
        if name in self.slim_clusters:
            return self.slim_clusters[name]  # type: ignore[return-value]
        shared = self.shared_statistics.get(name)
        return shared and shared.statistics

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise MergeError(REFUSAL)

    def unmerge(self) -> None:
        raise MergeError(REFUSAL)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if self.keeper.survey is not None:
            self._show(x)
            return result
        for name in self.active_adapters:
            if name in self.slim_in:
                result = self._with_experts(result, x, name)
        return result

    def _with_experts(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        """Add an adapter's experts to the layer's output, shape (…, d_out)."""
        config = self.slim_config[name]
        training = self.training and self.weights(name)[0].requires_grad
        masked = name in self.slim_mask and (training or config.merge_inference == "mask")
        now = _Pass(name, config, training, training and torch.is_grad_enabled(), masked)
        if now.gather:
            self.keeper.settle(name)
        distance, moments = self._distance(x, now)
        side_in, side_out = self._sides(now, moments)
        lean = skips_bypassed(x)
        rows = self._possible_rows(distance, config) if lean else None
        if rows is not None and not len(rows):
            self._record(now, x, torch.zeros(0, config.n_total, device=x.device), rows, distance)
            return untouched(result, *self.weights(name), side_in, side_out)
        flat = x.reshape(-1, x.shape[-1])
        if rows is not None:
            flat = take_rows(flat, rows)
        near = distance if rows is None or distance is None else distance[rows]
        h, weights = self._route(flat, name, side_in, near)
        self._record(now, x, weights, rows, distance)
        lora = weights[:, : config.n_experts]
        if lean:
            h, lora, rows = _drop_bypassed(h, lora, rows)
        h = h.unflatten(-1, (config.n_experts, config.r))
        h = h * (lora * self._scale(now)).unsqueeze(-1).to(h.dtype)
        return self._add(result, h.flatten(1), self.weights(name)[1], side_out, rows)

    def _distance(self, x: Tensor, now: _Pass) -> tuple[Tensor | None, Moments | None]:
        """Standardised distance of each token, and moments to gather; see InputStatistics."""
        statistics = self.statistics(now.name)
        if statistics is None:
            return None, None
        shared = self.shared_statistics.get(now.name)
        if shared is not None and shared.follows:
            return statistics.last_distance(x.shape[:-1].numel()), None
        if not now.gather and now.name in self.slim_clusters and statistics.steps == 0:
            self.keeper.check_complete(now.name, self.weights(now.name)[1])
        counting = functools.partial(self._counting, x, now.config)
        return statistics.distance(x, counting, gather=now.gather, training=now.training)

    def _show(self, x: Tensor) -> None:
        """Show the inputs to the survey, for discriminants of adapters that are being trained."""
        assert self.keeper.survey is not None
        flat = x.detach().reshape(-1, x.shape[-1])
        for name, statistics in self.discriminants().items():
            keep = self._counting(x, self.slim_config[name])
            self.keeper.survey(statistics, flat if keep is None else flat[keep])

    def _counting(self, x: Tensor, config: SlimConfig) -> Tensor | None:
        """Tokens that enter the statistics, bool of shape (n_tokens,); None for all."""
        return self._tokens(x, supervised=config.fit_on == "supervised", warn=True)

    def _tokens(self, x: Tensor, *, supervised: bool, warn: bool = False) -> Tensor | None:
        """Supervised tokens, or all but padding, bool of shape (n_tokens,); None for all."""
        if self.watch is None:
            return None
        if supervised:
            return self.watch.supervised(x, self.keeper.labels, warn=warn)
        return self.watch.not_padding(x)

    def _sides(self, now: _Pass, moments: Moments | None) -> tuple[Side | None, Side | None]:
        """How this pass uses ``slim_in`` and ``slim_out``; None for plainly."""
        if not (now.gather or now.masked):
            return None, None
        slim_in, slim_out = self.weights(now.name)
        config, mask = now.config, self._mask(now)
        slopes, counted, due = (0.0, 0.0), _never, _never
        if now.gather:
            slopes = l1_slopes(config.l1, config.r, slim_in.shape[1], len(slim_out))
            counted = functools.partial(self._on_backward, now.name, moments)
            # Backward reaches B first, and counts the pass when it reaches A.
            due = functools.partial(self.keeper.is_first, self.slim_key, now.name)
        return (
            Side(
                columns=None if mask is None else mask.columns,
                rows=None,
                n_masked=config.rank,
                slope=slopes[0],
                on_backward=counted,
            ),
            Side(
                columns=None,
                rows=None if mask is None else mask.rows,
                n_masked=len(slim_out),
                slope=slopes[1],
                on_backward=due,
            ),
        )

    def _mask(self, now: _Pass) -> Mask | None:
        """The mask that is in force in a pass, if any."""
        if not now.masked:
            return None
        source = self.keeper.inherited.get(now.name) if now.training else None
        return self.slim_mask[source if source in self.slim_mask else now.name]  # type: ignore[return-value,index]

    def _on_backward(self, name: str, moments: Moments | None) -> bool:
        """Gather moments and count the pass; return whether the penalty is due."""
        statistics = self.statistics(name)
        if moments is not None and statistics is not None:
            statistics.add(moments)
        return self.keeper.on_backward(self.slim_key, name)

    def _route(
        self, x: Tensor, name: str, side: Side | None, distance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden values of all experts, shape (n_tokens, rank), and routing weights, float32."""
        a, config = self.weights(name)[0], self.slim_config[name]
        hidden = product(x if _autocast(x) else x.to(a.dtype), a, side)
        if config.router:
            hidden, logits = hidden.split([config.rank, config.n_total], dim=-1)
            scores = standardise(logits.float())
        else:
            scores = torch.zeros(len(x), config.n_total, device=x.device)
        scores = yield_scores(scores, distance, config.n_experts, config.beta)
        return hidden, route(scores, config.kept)

    def _scale(self, now: _Pass) -> float:
        """Factor on the experts' output, dynamic merging included."""
        config = now.config
        if now.name not in self.slim_mask:
            return config.scale
        factor = merged_scale(config.merge_p, rescale=config.merge_rescale, masked=now.masked)
        return config.scale * factor

    def _possible_rows(self, distance: Tensor | None, config: SlimConfig) -> Tensor | None:
        """Indices of the tokens that may not bypass, if they are less than half; None for all."""
        if distance is None:
            return None
        sure = surely_bypassed(
            distance, config.n_experts, config.n_identity, config.kept, config.beta
        )
        if sure is None or int(sure.sum()) * 2 <= len(sure):
            return None
        return (~sure).nonzero().squeeze(-1)

    def _record(
        self,
        now: _Pass,
        x: Tensor,
        weights: Tensor,
        rows: Tensor | None,
        distance: Tensor | None,
    ) -> None:
        recorder = self.keeper.recorder
        if recorder is not None:
            keep = self._tokens(x, supervised=recorder.supervised)
            place, n_tokens = (self.slim_key, now.name), x.shape[:-1].numel()
            recorder.add(Routing(*place, now.config, weights, rows, distance, keep, n_tokens))

    def _add(
        self, result: Tensor, h: Tensor, b: Tensor, side: Side | None, rows: Tensor | None
    ) -> Tensor:
        """Add B·h to the output, to all tokens or to some rows."""
        if rows is None and result.dtype == h.dtype == b.dtype:
            flat = result.reshape(-1, result.shape[-1])
            return product(h, b, side, flat).view(result.shape)  # adds without a copy of B·h
        delta = product(h, b, side).to(result.dtype)
        if rows is None:
            return result + delta.view(result.shape)
        # A quantised layer may return its own storage, and a hook may keep what it was shown.
        if self.quantization_backend is not None or self.base_layer._forward_hooks:
            result = result.clone()
        return add_rows(result, delta, rows)

    def __repr__(self) -> str:
        return "slim." + super().__repr__()


def skips_bypassed(x: Tensor) -> bool:
    """Whether bypassed tokens of a layer's input are left out of its products.

    On a device other than the CPU, finding them waits for the device. That pays for many tokens
    without gradients.
    """
    return x.device.type == "cpu" or not (torch.is_grad_enabled() or x.shape[:-1].numel() < 1024)


def _drop_bypassed(
    h: Tensor, lora: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leave out tokens with no weight on LoRA experts, if enough of them bypass."""
    active = (lora.detach() > 0).any(-1)
    n_bypassed = len(active) - int(active.sum())
    if n_bypassed == 0 or n_bypassed < SKIP_FROM * len(active):
        return h, lora, rows
    kept = active.nonzero().squeeze(-1)
    return h[kept], lora[kept], kept if rows is None else rows[kept]


def _never() -> bool:
    return False


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
