"""A frozen linear layer with a mixture of LoRA and identity experts beside it.

:mod:`budwood.tune.equations` has the equations; this module applies them to the tokens of a pass.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from budwood.errors import MergeError
from budwood.tune.config import SlimConfig
from budwood.tune.equations import (
    axis_rate,
    l1_slopes,
    merged_scale,
    route,
    standardise,
    surely_bypassed,
    yield_scores,
)
from budwood.tune.slim.adapter_names import groups, owners
from budwood.tune.slim.autograd import Side, add_rows, product, take_rows, untouched
from budwood.tune.slim.clustering import Moments
from budwood.tune.slim.compiled import distance_in_graph, last_in_graph, new_handle, used_in_graph
from budwood.tune.slim.keeper import Routing, SlimLayer, StepKeeper
from budwood.tune.slim.one_token import bypasses, hidden_of_one, is_one_token, takes
from budwood.tune.slim.passes import Pass, SharedStatistics, Times, Weight
from budwood.tune.slim.state import InputStatistics, Mask, make_statistics
from budwood.tune.slim.token_watch import TokenWatch

SKIP_FROM = 0.25
"""Fraction of bypassed tokens from which only the others go through B."""
REFUSAL = (
    "SLIM chooses experts token by token, which no single weight can stand for: keep the adapter "
    "beside the model, or write an approximate LoRA with budwood.tune.export_lora"
)


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

    stack: tuple[int, ...] = ()
    """Leading axes of the adapter's weights."""

    def __init__(self, base_layer: nn.Module, keeper: StepKeeper, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = self._sizes()
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.slim_in = nn.ModuleDict()
        self.slim_out = nn.ModuleDict()
        self.slim_clusters = nn.ModuleDict()
        self.slim_mask = nn.ModuleDict()
        self.slim_dropout = nn.ModuleDict()
        self.shared_statistics: dict[str, SharedStatistics] = {}
        self.slim_config = {}
        self.handle = new_handle(self)
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
        d_in, d_out = self.in_features, self.out_features
        config = config.for_layer(self.slim_key)
        self.slim_config[name] = config
        n_rows = config.rank + (config.n_total if config.router else 0)
        # As for LoRA: A uniform within ±1/√d_in, B zero. The router's scale does not matter.
        slim_in = torch.empty(*self.stack, n_rows, d_in)
        nn.init.kaiming_uniform_(slim_in.view(-1, d_in), a=math.sqrt(5))
        self.slim_in[name] = Weight(slim_in)
        n_columns = config.rank + config.expert_bias
        self.slim_out[name] = Weight(torch.zeros(*self.stack, d_out, n_columns))
        dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.slim_dropout[name] = dropout.train(self.training)
        if config.merging and config.merge_p > 0:
            self.slim_mask[name] = Mask(config, d_in, d_out, self.slim_key)
        if config.yielding and shared is not None:
            self.shared_statistics[name] = shared
        elif config.yielding:
            self.slim_clusters[name] = make_statistics(
                config, self._measured_channels(), self.slim_key
            )
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _sizes(self) -> tuple[int, int]:
        """Input and output channels of the base layer."""
        d_in, d_out = _get_in_out_features(self.get_base_layer())
        return int(d_in or 0), int(d_out or 0)

    def _measured_channels(self) -> int:
        """Channels of the input whose distance is measured."""
        return self.in_features

    def statistics(self, name: str) -> InputStatistics | None:
        """An adapter's statistics of the input, held here or shared; None without yielding."""
        shared = self.shared_statistics.get(name)
        if shared is not None:
            return shared.statistics
        return self.slim_clusters[name] if name in self.slim_clusters else None  # noqa: SIM401  # type: ignore[return-value]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise MergeError(REFUSAL)

    def unmerge(self) -> None:
        raise MergeError(REFUSAL)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if self.keeper.survey is not None:
            self._show(x)
            return result
        if adapter_names is not None:
            return self._by_row(result, x, adapter_names)
        one = not self.training and self.keeper.recorder is None and is_one_token(x)
        for name in self.active_adapters:
            if name in self.slim_in:
                added = self._with_experts_on_one(result, x, name) if one else None
                result = self._with_experts(result, x, name) if added is None else added
        return result

    def _with_experts_on_one(self, result: Tensor, x: Tensor, name: str) -> Tensor | None:
        """The same as :meth:`_with_experts` for a single token; None where that is not possible."""
        config = self.slim_config[name]
        a, b = self.weights(name)
        if not takes(config, a, b):
            return None
        distance = self._distance_of_one(x, name)
        if distance is None:
            return None
        if bypasses(distance, config):
            return result
        h = hidden_of_one(x, a, distance, config, self._scale(name, masked=False))
        if h is None:
            return result
        if result.dtype != b.dtype:
            return result + torch.mv(b, h).to(result.dtype).view(result.shape)
        result = self._own(result)
        result.view(-1).addmv_(b, h)
        return result

    def _distance_of_one(self, x: Tensor, name: str) -> float | None:
        """Distance of a single token, 0 without yielding; None while nothing yields."""
        shared, statistics = self.shared_statistics.get(name), self.statistics(name)
        if statistics is None:
            return 0.0
        if shared is not None and shared.follows:
            return statistics.last_of_one()
        return statistics.distance_of_one(x)

    def _by_row(self, result: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """Add the experts of each row's own adapter; see :mod:`budwood.tune.slim.adapter_names`."""
        owner = owners(x, names, self.slim_key)
        for name, numbers in groups(names, self.slim_in).items():
            rows = torch.isin(owner, torch.tensor(numbers, device=x.device)).nonzero().squeeze(-1)
            part = self._with_experts(result[rows], x[rows], name, (x, rows))
            result = result.index_copy(0, rows, part)
        return result

    def _with_experts(
        self, result: Tensor, x: Tensor, name: str, part: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Add an adapter's experts to the layer's output, shape (…, d_out)."""
        now = self._begin(name, part)
        config = now.config
        distance, moments = self._distance(x, now)
        a, b, side_in, side_out = self._used(now, moments)
        lean = skips_bypassed(x)
        rows = self._possible_rows(distance, config) if lean else None
        if rows is not None and not len(rows):
            self._record_bypass(now, x, distance)
            return untouched(result, a, b, side_in, side_out)
        flat = x.reshape(-1, x.shape[-1])
        if rows is not None:
            flat = take_rows(flat, rows)
        near = distance if rows is None or distance is None else distance[rows]
        h, weights = self._route(flat, a, now, side_in, near, product)
        self._record(now, x, weights, rows, distance)
        lora = weights.narrow(-1, 0, config.n_experts)
        if lean:
            h, lora, rows = _drop_bypassed(h, lora, rows)
        return self._add(result, self._weighted(h, lora, now), b, side_out, rows)

    def _begin(self, name: str, part: tuple[Tensor, Tensor] | None) -> Pass:
        """Begin a pass of an adapter; ``part`` as in :class:`Pass`."""
        config = self.slim_config[name]
        training = self.training and self.weights(name)[0].requires_grad
        gather = training and torch.is_grad_enabled()
        masked = name in self.slim_mask and (training or config.merge_inference == "mask")
        if gather and self.keeper.inherited:
            self.keeper.settle(name)
        return Pass(name, config, training, gather, masked, part)

    def _distance(self, x: Tensor, now: Pass) -> tuple[Tensor | None, Moments | Tensor | None]:
        """Standardised distance of each token, and moments to gather; see InputStatistics."""
        statistics = self.statistics(now.name)
        if statistics is None:
            return None, None
        if torch.compiler.is_compiling():
            return self._distance_in_graph(statistics, x, now)
        shared = self.shared_statistics.get(now.name)
        if shared is not None and shared.follows:
            return statistics.last_distance(x.shape[:-1].numel()), None
        if not now.gather and now.name in self.slim_clusters and statistics.steps == 0:
            self.keeper.check_complete(now.name, self.weights(now.name)[1])
        counting = functools.partial(self._counting, x, now.config, self.keeper.labels)
        return statistics.distance(x, counting, gather=now.gather, training=now.training)

    def _distance_in_graph(
        self, statistics: InputStatistics, x: Tensor, now: Pass
    ) -> tuple[Tensor | None, Tensor | None]:
        """The same inside a graph, with the moments as one vector."""
        shared = self.shared_statistics.get(now.name)
        if shared is not None and shared.follows:
            return last_in_graph(statistics, x), None
        keep = self._counting(x, now.config, self.keeper.labels) if now.gather else None
        distance, moments = distance_in_graph(
            statistics, x, keep, gather=now.gather, training=now.training
        )
        # Of the layers that share an input one gathers.
        gathers = now.gather and now.name in self.slim_clusters
        return distance, moments if gathers else None

    def _show(self, x: Tensor) -> None:
        """Show the inputs to the survey, for discriminants of adapters that are being trained."""
        survey = self.keeper.survey
        assert survey is not None
        flat = x.detach().reshape(-1, x.shape[-1])
        for name, statistics in self.discriminants().items():
            keep = self._counting(x, self.slim_config[name], survey.labels_of(statistics))
            survey.see(statistics, flat if keep is None else flat[keep])

    def _counting(self, x: Tensor, config: SlimConfig, labels: Tensor | None) -> Tensor | None:
        """Tokens that enter the statistics, bool of shape (n_tokens,); None for all."""
        return self._tokens(x, labels, supervised=config.fit_on != "all", warn=True)

    def _tokens(
        self, x: Tensor, labels: Tensor | None, *, supervised: bool, warn: bool = False
    ) -> Tensor | None:
        """Supervised tokens, or all but padding, bool of shape (n_tokens,); None for all."""
        if self.watch is None:
            return None
        if supervised:
            return self.watch.supervised(x, labels, warn=warn)
        return self.watch.not_padding(x)

    def _used(
        self, now: Pass, moments: Moments | Tensor | None
    ) -> tuple[Tensor, Tensor, Side | None, Side | None]:
        """A and B, and how a pass uses them; in a graph they are used already."""
        a, b = self.weights(now.name)
        if not torch.compiler.is_compiling():
            return a, b, *self._sides(now, moments)  # type: ignore[arg-type]
        if not (now.gather or now.masked):
            return a, b, None, None
        mask, (slope_a, slope_b) = self._mask(now), self._slopes(now)
        columns = None if mask is None else mask.columns
        rows = None if mask is None else mask.rows
        moments = a.new_empty(0) if moments is None else moments
        of_a = (columns, None, moments, now.config.rank, slope_a)
        of_b = (None, rows, None, self.out_features, slope_b)
        used_a, used_b = (
            used_in_graph(self.handle, weight, *how, now.name, now.gather)  # type: ignore[arg-type]
            for weight, how in ((a, of_a), (b, of_b))
        )
        return used_a, used_b, None, None

    def _slopes(self, now: Pass) -> tuple[float, float]:
        """Slopes of the penalty on A and B in a pass."""
        if not now.gather:
            return 0.0, 0.0
        config = now.config
        return l1_slopes(config.l1, config.r, self.in_features, self.out_features)

    def noted(self, adapter: str, moments: Tensor | None) -> bool:
        """Note a backward pass of A, with its moments, or of B, without; see ``compiled``."""
        if moments is None:
            return self.keeper.on_backward_of_b(self.slim_key, adapter)
        statistics = self.statistics(adapter)
        if len(moments) and statistics is not None:
            statistics.add(moments)
        return self.keeper.on_backward(self.slim_key, adapter)

    def _sides(self, now: Pass, moments: Moments | None) -> tuple[Side | None, Side | None]:
        """How this pass uses ``slim_in`` and ``slim_out``; None for plainly."""
        if not (now.gather or now.masked):
            return None, None
        config, mask = now.config, self._mask(now)
        slopes, counted, due = self._slopes(now), _never, _never
        if now.gather:
            counted = functools.partial(self._on_backward, now.name, moments)
            due = functools.partial(self.keeper.on_backward_of_b, self.slim_key, now.name)
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
                n_masked=self.out_features,
                slope=slopes[1],
                on_backward=due,
            ),
        )

    def _mask(self, now: Pass) -> Mask | None:
        """The mask that is in force in a pass, if any."""
        if not now.masked:
            return None
        source = self.keeper.inherited.get(now.name) if now.training else None
        return self.slim_mask[source if source in self.slim_mask else now.name]  # type: ignore[return-value,index]

    def _on_backward(self, name: str, moments: Moments | None) -> bool:
        """Gather moments and count the pass; return whether the penalty is due."""
        return self.noted(name, torch.empty(0) if moments is None else moments.flat())

    def _route(
        self,
        x: Tensor,
        a: Tensor,
        now: Pass,
        side: Side | None,
        distance: Tensor | None,
        times: Times,
    ) -> tuple[Tensor, Tensor]:
        """Hidden values of all experts, shape (n_tokens, rank), and routing weights, float32."""
        config = now.config
        x = x if _autocast(x) else x.to(a.dtype)
        dropped = self.slim_dropout[now.name](x)
        hidden = times(dropped, a, side)
        if config.router:
            hidden, logits = hidden.split_with_sizes((config.rank, config.n_total), -1)
            if dropped is not x:  # the router sees the whole input
                logits = times(x, a[..., config.rank :, :], None)
            scores = standardise(logits.float())
        else:
            scores = torch.zeros(len(x), config.n_total, device=x.device)
        scores = yield_scores(scores, distance, config.n_experts, config.beta)
        return hidden, route(scores, config.kept)

    def _weighted(self, h: Tensor, lora: Tensor, now: Pass) -> Tensor:
        """Hidden values times routing weights and scale, one for each column of B."""
        config = now.config
        h = h.unflatten(-1, (config.n_experts, config.r))
        scale = self._scale(now.name, masked=now.masked)
        h = (h * (lora * scale).unsqueeze(-1).to(h.dtype)).flatten(1)
        if not config.expert_bias:
            return h
        scale = 1.0
        if now.name in self.slim_mask:  # a bias has rows to mask, and no columns
            rate = axis_rate(config.merge_p)
            scale = merged_scale(rate, rescale=config.merge_rescale, masked=now.masked)
        return torch.cat([h, lora.sum(-1, keepdim=True).to(h.dtype) * scale], -1)

    def _scale(self, name: str, *, masked: bool) -> float:
        """Factor on the experts' output, dynamic merging included."""
        config = self.slim_config[name]
        if name not in self.slim_mask:
            return config.scale
        factor = merged_scale(config.merge_p, rescale=config.merge_rescale, masked=masked)
        return config.scale * factor

    def _possible_rows(self, distance: Tensor | None, config: SlimConfig) -> Tensor | None:
        """Indices of the tokens that may not bypass, if they are less than half; None for all."""
        if distance is None:
            return None
        sure = surely_bypassed(
            distance, config.n_experts, config.n_identity, config.kept, config.beta
        )
        if sure is None or int(sure.count_nonzero()) * 2 <= len(sure):
            return None
        return (~sure).nonzero().squeeze(-1)

    def _record(
        self,
        now: Pass,
        x: Tensor,
        weights: Tensor,
        rows: Tensor | None,
        distance: Tensor | None,
    ) -> None:
        recorder = self.keeper.recorder
        if recorder is not None:
            keep = self._recorded_tokens(now, x)
            place, n_tokens = (self.slim_key, now.name), x.shape[:-1].numel()
            recorder.add(Routing(*place, now.config, weights, rows, distance, keep, n_tokens))

    def _record_bypass(self, now: Pass, x: Tensor, distance: Tensor | None) -> None:
        """Record a pass in which every token surely bypasses."""
        none = torch.zeros(0, now.config.n_total, device=x.device)
        self._record(now, x, none, none[:, 0].long(), distance)

    def _recorded_tokens(self, now: Pass, x: Tensor) -> Tensor | None:
        """Tokens of a pass that the recorder counts, bool, shape (n_tokens,); None for all."""
        assert self.keeper.recorder is not None
        whole, rows = now.part or (x, None)
        supervised = self.keeper.recorder.supervised
        keep = self._tokens(whole, self.keeper.labels, supervised=supervised)
        if keep is None or rows is None:
            return keep
        return keep.view(len(whole), -1)[rows].flatten()

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
        return add_rows(self._own(result), delta, rows)

    def _own(self, result: Tensor) -> Tensor:
        """The base layer's output, or a copy where that may not be changed in place."""
        # A quantised layer may return its own storage, and a hook may keep what it was shown.
        if self.quantization_backend is not None or self.base_layer._forward_hooks:
            return result.clone()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = new_handle(self)

    def __repr__(self) -> str:
        return "slim." + super().__repr__()


def skips_bypassed(x: Tensor) -> bool:
    """Whether bypassed tokens of a layer's input are left out of its products.

    On a device other than the CPU, finding them waits for the device. That pays for many tokens
    without gradients. A graph of ``torch.compile`` has no place for it.
    """
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or not (torch.is_grad_enabled() or x.shape[:-1].numel() < 1024)


def _drop_bypassed(
    h: Tensor, lora: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leave out tokens with no weight on LoRA experts, if enough of them bypass."""
    active = lora.detach().any(-1)
    n_bypassed = len(active) - int(active.count_nonzero())
    if n_bypassed == 0 or n_bypassed < SKIP_FROM * len(active):
        return h, lora, rows
    kept = active.nonzero().squeeze(-1)
    return h[kept], lora[kept], kept if rows is None else rows[kept]


def _never() -> bool:
    return False


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
