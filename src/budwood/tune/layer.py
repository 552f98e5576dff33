"""A frozen linear layer with a mixture of LoRA and identity experts beside it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from budwood.errors import MergeError
from budwood.tune.clustering import Moments
from budwood.tune.config import SlimConfig
from budwood.tune.merging import merged_scale
from budwood.tune.product import Side, product, untouched
from budwood.tune.regularisation import l1_slopes
from budwood.tune.router import route, standardise
from budwood.tune.rows import add_rows, take_rows
from budwood.tune.state import Clusters, Discriminant, Mask, make_clusters
from budwood.tune.steps import StepKeeper
from budwood.tune.tokens import TokenWatch
from budwood.tune.yielding import surely_bypassed, yield_scores

if TYPE_CHECKING:
    from budwood.tune.fitting import Survey

SKIP_FROM = 0.25
"""Share of bypassed tokens from which only the others go through B."""
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
        training: whether it is one of training, which reentrant checkpointing begins without
            gradients.
        gather: whether it has gradients, so that statistics are gathered in its backward pass.
        masked: whether a mask of dynamic merging is in force.
    """

    name: str
    config: SlimConfig
    training: bool
    gather: bool
    masked: bool


@dataclass(frozen=True, eq=False)
class Shared:
    """Statistics that another layer owns.

    Attributes:
        clusters: the statistics.
        follows: the other layer's input is another, at the beginning of the block.
    """

    clusters: Clusters
    follows: bool


class SlimLayer(BaseTunerLayer):
    """What PEFT knows about a SLIM layer; every dict is keyed by adapter name.

    Attributes:
        slim_in: A of all experts above the rows of the router, shape
            (n_experts · r + n_experts + n_identity, d_in); without a router only A.
        slim_out: B of all experts side by side, shape (d_out, n_experts · r).
        slim_clusters: statistics of the inputs, of the first layer that reads an input.
        slim_mask: masks of dynamic merging.
        shared_clusters: statistics that another layer owns.
        slim_config: configs.
    """

    adapter_layer_names = ("slim_in", "slim_out")
    other_param_names = ("slim_clusters", "slim_mask", "shared_clusters", "slim_config")


class SlimLinear(nn.Module, SlimLayer):
    """SLIM beside a linear layer, quantised or not.

    Source: SLIM: y = W·x + b + Σ_i ŵ_i·f_i(x), f_i(x) = B_i·A_i·x for LoRA experts and 0 for
    identity experts. All A and the router are one matrix product, all B another, with the routing
    weights on the rank axis between them. A token without weight on any LoRA expert gets exactly
    the base layer's output.

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
        self.slim_in = nn.ParameterDict()
        self.slim_out = nn.ParameterDict()
        self.slim_clusters = nn.ModuleDict()
        self.slim_mask = nn.ModuleDict()
        self.shared_clusters: dict[str, Shared] = {}
        self.slim_config: dict[str, SlimConfig] = {}
        self.slim_key = key
        self.keeper = keeper
        self.watch: TokenWatch | None = None
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, name: str, config: SlimConfig, shared: Shared | None) -> None:
        """Add an adapter.

        Args:
            name: of the adapter.
            config: of the adapter.
            shared: statistics that another layer owns; None to have its own.
        """
        d_in, d_out = int(self.in_features or 0), int(self.out_features or 0)
        self.slim_config[name] = config
        n_rows = config.rank + (config.n_total if config.router else 0)
        # As for LoRA: A uniform within ±1/√d_in, B zero. The router's scale does not matter.
        slim_in = torch.empty(n_rows, d_in)
        nn.init.kaiming_uniform_(slim_in, a=math.sqrt(5))
        self.slim_in[name] = nn.Parameter(slim_in)
        self.slim_out[name] = nn.Parameter(torch.zeros(d_out, config.rank))
        if config.merging and config.merge_p > 0:
            self.slim_mask[name] = Mask(config, d_in, d_out, self.slim_key)
        if config.yielding and shared is not None:
            self.shared_clusters[name] = shared
        elif config.yielding:
            self.slim_clusters[name] = make_clusters(config, d_in, self.slim_key)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def clusters(self, name: str) -> Clusters | None:
        """Statistics of an adapter, its own or shared; None without yielding."""
        if name in self.slim_clusters:
            return self.slim_clusters[name]  # type: ignore[return-value]
        shared = self.shared_clusters.get(name)
        return shared and shared.clusters

    def trained_adapters(self) -> list[str]:
        """Active adapters that are being trained."""
        return [
            name
            for name in self.active_adapters
            if name in self.slim_in and self.slim_in[name].requires_grad
        ]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise MergeError(REFUSAL)

    def unmerge(self) -> None:
        raise MergeError(REFUSAL)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if self.keeper.survey is not None:
            self._show(x, self.keeper.survey)
            return result
        for name in self.active_adapters:
            if name in self.slim_in:
                result = self._with_experts(result, x, name)
        return result

    def _with_experts(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        """The layer's output with an adapter, shape (…, d_out), from that without it."""
        config = self.slim_config[name]
        training = self.training and self.slim_in[name].requires_grad
        masked = name in self.slim_mask and (training or config.merge_inference == "mask")
        now = _Pass(name, config, training, training and torch.is_grad_enabled(), masked)
        distance, moments = self._distance(x, now)
        side_in, side_out = self._sides(now, moments)
        lean = self._skips(x)
        rows = self._possible_rows(distance, config) if lean else None
        if rows is not None and not len(rows):
            self._record(now, x, torch.zeros(0, config.n_total, device=x.device), rows, distance)
            return untouched(result, self.slim_in[name], self.slim_out[name], side_in, side_out)
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
        return self._add(result, h.flatten(1), self.slim_out[name], side_out, rows)

    def _distance(self, x: Tensor, now: _Pass) -> tuple[Tensor | None, Moments | None]:
        clusters = self.clusters(now.name)
        if clusters is None:
            return None, None
        shared = self.shared_clusters.get(now.name)
        if shared is not None and shared.follows:
            return clusters.measured(x.shape[:-1].numel()), None
        counting = functools.partial(self._counting, x, now.config)
        return clusters.distance(x, counting, gather=now.gather, training=now.training)

    def discriminants(self) -> list[tuple[Discriminant, SlimConfig]]:
        """This layer's own that are fitted before training, of adapters that are being trained."""
        found = (
            (self.slim_clusters[one], self.slim_config[one])
            for one in self.trained_adapters()
            if one in self.slim_clusters
        )
        return [(one, config) for one, config in found if isinstance(one, Discriminant)]

    def _show(self, x: Tensor, survey: Survey) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        for clusters, config in self.discriminants():
            keep = self._counting(x, config)
            survey.see(clusters, flat if keep is None else flat[keep])

    def _keep(self, x: Tensor) -> Tensor | None:
        return None if self.watch is None else self.watch.keep(x)

    def _counting(self, x: Tensor, config: SlimConfig) -> Tensor | None:
        """Tokens that enter the statistics."""
        return self._keep(x) if config.fit_on == "all" else self._learnt(x)

    def _learnt(self, x: Tensor) -> Tensor | None:
        return None if self.watch is None else self.watch.learnt(x, self.keeper.labels)

    def _sides(self, now: _Pass, moments: Moments | None) -> tuple[Side | None, Side | None]:
        """How this pass uses ``slim_in`` and ``slim_out``."""
        if not (now.gather or now.masked):
            return None, None
        slim_in, slim_out = self.slim_in[now.name], self.slim_out[now.name]
        config, mask = now.config, self.slim_mask[now.name] if now.masked else None
        slopes, counted, due = (0.0, 0.0), _never, _never
        if now.gather:
            slopes = l1_slopes(config.l1, config.r, slim_in.shape[1], len(slim_out))
            counted = functools.partial(self._on_backward, now.name, moments)
            # Backward comes to B first: what is due there is counted when it comes to A.
            due = functools.partial(self.keeper.is_first, self.slim_key, now.name)
        return (
            Side(
                columns=None if mask is None else mask.columns,  # type: ignore[arg-type]
                rows=None,
                n_masked=config.rank,
                slope=slopes[0],
                on_backward=counted,
            ),
            Side(
                columns=None,
                rows=None if mask is None else mask.rows,  # type: ignore[arg-type]
                n_masked=len(slim_out),
                slope=slopes[1],
                on_backward=due,
            ),
        )

    def _on_backward(self, name: str, moments: Moments | None) -> bool:
        clusters = self.clusters(name)
        if moments is not None and clusters is not None:
            clusters.add(moments)
        return self.keeper.on_backward(self.slim_key, name)

    def _route(
        self, x: Tensor, name: str, side: Side | None, distance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden values of all experts, shape (n_tokens, rank), and routing weights, float32."""
        a, config = self.slim_in[name], self.slim_config[name]
        hidden = product(x if _autocast(x) else x.to(a.dtype), a, side)
        if config.router:
            hidden, logits = hidden.split([config.rank, config.n_total], dim=-1)
            scores = standardise(logits.float())
        else:
            scores = torch.zeros(len(x), config.n_total, device=x.device)
        scores = yield_scores(scores, distance, config.n_experts, config.beta)
        return hidden, route(scores, config.kept)

    def _scale(self, now: _Pass) -> float:
        config = now.config
        scale = config.scale
        if now.name not in self.slim_mask:
            return scale
        return scale * merged_scale(config.merge_p, rescale=config.merge_rescale, masked=now.masked)

    def _skips(self, x: Tensor) -> bool:
        """Whether bypassed tokens are left out; elsewhere that would wait for the device."""
        return x.device.type == "cpu" or not (
            torch.is_grad_enabled() or x.shape[:-1].numel() < 1024
        )

    def _possible_rows(self, distance: Tensor | None, config: SlimConfig) -> Tensor | None:
        """Tokens that might not bypass, if they are the lesser part; None for all."""
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
            place = (self.slim_key, now.name)
            n_tokens = x.shape[:-1].numel()
            keep = self._learnt(x) if recorder.learnt else self._keep(x)
            recorder.add(place, now.config, weights, rows, distance, keep, n_tokens)

    def _add(
        self, result: Tensor, h: Tensor, b: Tensor, side: Side | None, rows: Tensor | None
    ) -> Tensor:
        if rows is None and result.dtype == h.dtype == b.dtype:
            flat = result.reshape(-1, result.shape[-1])
            return product(h, b, side, flat).view(result.shape)  # adds without a copy of B·h
        delta = product(h, b, side).to(result.dtype)
        if rows is None:
            return result + delta.view(result.shape)
        # A quantised layer may hand out its own storage, and a hook keep what it was shown.
        if self.quantization_backend is not None or self.base_layer._forward_hooks:
            result = result.clone()
        return add_rows(result, delta, rows)

    def __repr__(self) -> str:
        return "slim." + super().__repr__()


def _drop_bypassed(
    h: Tensor, lora: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leave out tokens with no weight on LoRA experts, where enough of them bypass."""
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
