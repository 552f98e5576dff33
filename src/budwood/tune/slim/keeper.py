"""The base class of SLIM layers, and the keeper that the layers of a model share.

Layers gather statistics in backward. A :class:`StepKeeper` commits them after each optimiser step,
and then draws the next masks. It also holds the labels of a pass, and who records its routing.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from budwood.errors import AttachError, DivergedError
from budwood.tune.config import SlimConfig
from budwood.tune.slim.state import DiscriminantStatistics, InputStatistics, Mask

WEIGHTS, STATES = ("slim_in", "slim_out"), ("slim_clusters", "slim_mask")
TENSORS = (*WEIGHTS, *STATES)
"""Where a layer holds the tensors of its adapters: what is trained, and the rest."""
PATIENCE = 1000
"""Backward passes without an optimiser step before a warning."""


class SlimLayer(nn.Module, BaseTunerLayer):
    """What PEFT and the optimiser steps know about a SLIM layer; dicts are keyed by adapter.

    Names follow PEFT's convention, as in ``slim_in.default.weight``: libraries find the tensors of
    an adapter by ``".default."`` in their names.

    Attributes:
        slim_in: A of all experts above the rows of the router, a weight of shape
            (n_experts · r + n_experts + n_identity, d_in); without a router A alone.
        slim_out: B of all experts side by side, and their bias if they have one, a weight of shape
            (d_out, n_experts · r) or (d_out, n_experts · r + 1).
        slim_clusters: :class:`InputStatistics`, in the first layer that reads an input. The name is
            that of the tensors in saved adapters.
        slim_mask: :class:`budwood.tune.slim.state.Mask` of dynamic merging.
        slim_dropout: ``nn.Dropout`` on the input of A, which trainers find by its class to switch
            it off; ``nn.Identity`` for none.
        slim_config: configs.
        slim_key: name of the layer in the model.
        keeper: shared by the layers of the model.
    """

    adapter_layer_names = WEIGHTS
    other_param_names = (*STATES, "slim_dropout", "shared_statistics", "slim_config")

    slim_in: nn.ModuleDict
    slim_out: nn.ModuleDict
    slim_clusters: nn.ModuleDict
    slim_mask: nn.ModuleDict
    slim_dropout: nn.ModuleDict
    slim_config: dict[str, SlimConfig]
    slim_key: str
    keeper: StepKeeper

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """``slim_in`` and ``slim_out`` of an adapter."""
        held: Any = self._modules  # directly, since every token asks every layer
        return held["slim_in"]._modules[name].weight, held["slim_out"]._modules[name].weight

    def trained_adapters(self) -> list[str]:
        """Names of the active adapters that are being trained."""
        return [
            name
            for name in self.active_adapters
            if name in self.slim_in and self.weights(name)[0].requires_grad
        ]

    def states(self, name: str) -> list[InputStatistics | Mask]:
        """Statistics and mask of an adapter, those that this layer holds."""
        held = (getattr(self, where) for where in STATES)
        return [states[name] for states in held if name in states]

    def discriminants(self) -> dict[str, DiscriminantStatistics]:
        """Discriminants that this layer holds for the adapters that are being trained."""
        return {
            name: statistics
            for name in self.trained_adapters()
            if name in self.slim_clusters
            and isinstance(statistics := self.slim_clusters[name], DiscriminantStatistics)
        }


@dataclass(frozen=True, eq=False)
class Routing:
    """Where one layer sent the tokens of one forward pass.

    Attributes:
        layer: name of the layer.
        adapter: name of the adapter.
        config: of the adapter.
        weights: routing weights, shape (n_routed, n_experts + n_identity).
        rows: tokens that were routed, shape (n_routed,); the others surely bypass. None for all.
        distance: standardised distance of all tokens, shape (n_tokens,), or None.
        keep: tokens that count, bool, shape (n_tokens,); None for all.
        n_tokens: tokens of the pass.
    """

    layer: str
    adapter: str
    config: SlimConfig
    weights: Tensor
    rows: Tensor | None
    distance: Tensor | None
    keep: Tensor | None
    n_tokens: int


class RoutingRecorder(Protocol):
    """Takes the routing of each forward pass; see :func:`budwood.tune.observe`.

    Attributes:
        supervised: count supervised tokens only, instead of all but padding.
    """

    supervised: bool

    def add(self, routing: Routing) -> None:
        """Take the routing of one pass of one layer."""


class InputSurvey(Protocol):
    """Takes the inputs of the layers; see :func:`budwood.tune.fit_discriminant`."""

    def labels_of(self, statistics: InputStatistics) -> Tensor:
        """Labels behind the tokens that count for a layer, shape (n_rows, length)."""
        ...

    def see(self, statistics: InputStatistics, x: Tensor) -> None:
        """Take the inputs of a layer at these tokens, shape (n_tokens, d_in)."""


class StepKeeper:
    """Notices optimiser steps, and commits what was gathered since the last one.

    PyTorch calls a hook after every ``optimizer.step()``. A keeper commits there if the optimiser
    holds its weights. So plain loops and trainers need no extra call, and what is saved after a
    step is complete. Over several ranks a commit is one all-reduce, at a point that all ranks
    reach.

    Args:
        model: the model that holds the layers.

    Attributes:
        recorder: takes the routing of each pass; None for no recording.
        survey: takes the inputs of the layers, which then add nothing; None for no survey.
        labels: labels of the next passes, of models that are not given any.
        inherited: adapter → the adapter whose statistics and masks it started with. It uses that
            adapter's masks until it is trained itself, so that a reference differs from the trained
            adapter by what was learnt alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorder: RoutingRecorder | None = None
        self.survey: InputSurvey | None = None
        self.labels: Tensor | None = None
        self.inherited: dict[str, str] = {}
        self._incomplete: set[str] = set()
        self._n_passes: dict[tuple[str, str], int] = {}
        self._penalised: set[tuple[str, str]] = set()
        self._warned = False
        _follow(self)

    @property
    def pending(self) -> bool:
        """Whether there was a backward pass since the last commit."""
        return bool(self._n_passes)

    def on_backward_of_b(self, layer: str, adapter: str) -> bool:
        """Note a backward pass of B; return whether it was the first in this step."""
        first = (layer, adapter) not in self._penalised
        self._penalised.add((layer, adapter))
        return first

    def on_backward(self, layer: str, adapter: str) -> bool:
        """Count a backward pass of a layer; return whether it was the first in this step."""
        n_passes = self._n_passes[layer, adapter] = self._n_passes.get((layer, adapter), 0) + 1
        if n_passes > PATIENCE and not self._warned:
            self._warned = True
            warnings.warn(
                f"SLIM: {PATIENCE} backward passes and no optimiser step was noticed: add "
                "SlimCallback() or call budwood.tune.commit(model) after each step",
                UserWarning,
                stacklevel=2,
            )
        return n_passes == 1

    def after_step(self, held: set[int]) -> None:
        """Commit the adapters with parameters of these ids."""
        if self.pending:
            watch = getattr(self.layers()[0], "watch", None)
            if watch is not None:
                watch.check_graph()
            self.commit(held)

    def commit(self, held: set[int] | None = None) -> bool:
        """Commit the statistics gathered since the last commit, and draw the next masks.

        Args:
            held: ids of parameters whose adapters are committed; None for all adapters.

        Returns:
            Whether there was anything to commit.

        Raises:
            DivergedError: a layer's inputs were NaN or infinite; no statistics are changed.
        """
        places = [
            (layer, name)
            for layer in self.layers()
            for name in layer.slim_in
            if held is None or held & {id(weight) for weight in layer.weights(name)}
        ]
        # An adapter as a whole: which of its layers saw a token may differ between ranks.
        trained = {name for layer, name in places if (layer.slim_key, name) in self._n_passes}
        places = [(layer, name) for layer, name in places if name in trained]
        for layer, name in places:
            self._n_passes.pop((layer.slim_key, name), None)
            self._penalised.discard((layer.slim_key, name))
        statistics: list[Any] = [
            layer.slim_clusters[name] for layer, name in places if name in layer.slim_clusters
        ]
        _reduce_and_commit(statistics)
        for layer, name in places:
            if name in layer.slim_mask:
                layer.slim_mask[name].commit()  # type: ignore[operator]
        return bool(places)

    def inherit(self, source: str | None, adapter: str) -> None:
        """Start a new adapter with the statistics and masks of another one, or with none."""
        self.inherited.pop(adapter, None)
        if source is None:
            return
        for layer in self.layers():
            for state, other in zip(layer.states(adapter), layer.states(source), strict=True):
                state.load_state_dict(other.state_dict())
        self.inherited[adapter] = source

    def settle(self, adapter: str) -> None:
        """Reset an adapter that inherited statistics and no weights: it is trained from scratch.

        Called before its first pass of training.
        """
        if self.inherited.pop(adapter, None) is None:
            return
        layers = [layer for layer in self.layers() if adapter in layer.slim_out]
        if not any(bool(layer.weights(adapter)[1].any()) for layer in layers):
            for state in (state for layer in layers for state in layer.states(adapter)):
                state.reset()

    def check_complete(self, adapter: str, b: Tensor) -> None:
        """Warn of an adapter with weights and no statistics, with which no token yields.

        Args:
            adapter: its name; one of its layers has no statistics.
            b: ``slim_out`` of that layer.
        """
        if adapter in self._incomplete or not bool(b.any()):
            return
        self._incomplete.add(adapter)
        warnings.warn(
            f"SLIM: adapter {adapter!r} has weights but no statistics, so no token yields: copy "
            "its buffers as well as its parameters, or call budwood.tune.commit(model) after each "
            "step of training",
            UserWarning,
            stacklevel=2,
        )

    def forget_gathered(self) -> None:
        """Drop what was gathered since the last commit."""
        self._n_passes.clear()
        self._penalised.clear()
        for layer in self.layers():
            for statistics in layer.slim_clusters.values():
                statistics.forget()  # type: ignore[operator]

    def layers(self) -> list[SlimLayer]:
        """All SLIM layers of the model, in its order."""
        return layers_of(self.model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _follow(self)


class SlimCallback(TrainerCallback):
    """Commits after each optimiser step, for optimisers that PyTorch's hook does not see.

    A ``Trainer`` with a ``torch.optim.Optimizer`` does not need it. Engines that hold copies of the
    weights, such as DeepSpeed, do; a warning says so. It does no harm where it is not needed.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        commit(kwargs["model"])


def layers_of(model: nn.Module) -> list[SlimLayer]:
    """List the SLIM layers of a model, wrapped or not, in its order."""
    return [module for module in model.modules() if isinstance(module, SlimLayer)]


def is_slim(model: Any) -> bool:
    """Whether the active adapter is SLIM's."""
    config = getattr(model, "active_peft_config", None)
    return getattr(config, "peft_type", None) == "SLIM"


def keeper_of(model: nn.Module) -> StepKeeper:
    """Return the keeper that a model's layers share.

    Raises:
        AttachError: the model has no SLIM layers.
    """
    layers = layers_of(model)
    if not layers:
        raise AttachError("the model has no SLIM layers; make it with peft.get_peft_model first")
    return layers[0].keeper


def commit(model: nn.Module) -> bool:
    """Commit the statistics of an optimiser step now, and draw the masks of the next.

    This happens by itself with any ``torch.optim.Optimizer`` that holds the adapter's parameters.
    With another kind of optimiser, call it after each step, on every rank.

    Args:
        model: a model with SLIM layers, wrapped or not.

    Returns:
        Whether there was anything to commit.

    Raises:
        AttachError: the model has no SLIM layers.
        DivergedError: a layer's inputs were NaN or infinite.
    """
    return keeper_of(model).commit()


def tell_labels(model: nn.Module, labels: Tensor | None) -> None:
    """Tell the layers which tokens are supervised, if the model's forward pass gets no labels.

    With ``fit_on="supervised"`` statistics describe the tokens whose next token has a label. A
    model that is called with ``labels`` knows them, and a Trainer's are found in the Trainer. A
    loop that computes the loss by itself calls this before each forward pass; otherwise all tokens
    but padding count, and a warning says so.

    Args:
        model: a model with SLIM layers, wrapped or not.
        labels: −100 where there is no label, shape (batch, length), or of the last positions only.
            They hold until the next call. None for no labels.

    Raises:
        AttachError: the model has no SLIM layers.
    """
    keeper_of(model).labels = labels


def _reduce_and_commit(statistics: list[InputStatistics]) -> None:
    """Sum the gathered moments over ranks in one all-reduce, and move the statistics by them."""
    if not statistics:
        return
    parts = [layer.take() for layer in statistics]
    sizes = [len(part) for part in parts]
    flat = torch.cat([part.to(parts[0].device) for part in parts])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    _check_finite(flat, [layer.key for layer in statistics], sizes)
    for layer, part in zip(statistics, flat.split(sizes)):
        layer.commit(part)


def _check_finite(flat: Tensor, names: list[str], sizes: list[int]) -> None:
    """Refuse NaN or infinite moments, naming the first layer that has them."""
    if bool(flat.sum().isfinite()) or bool(flat.isfinite().all()):
        return
    for name, part in zip(names, flat.split(sizes)):
        if not bool(part.isfinite().all()):
            raise DivergedError(
                f"inputs of layer {name!r} are NaN or infinite; the statistics keep their last "
                "good values: lower the learning rate, or train in bfloat16 or float32"
            )


_KEEPERS: weakref.WeakSet[StepKeeper] = weakref.WeakSet()
_HOOKS: list[Any] = []


def _follow(keeper: StepKeeper) -> None:
    """Commit after the steps of optimisers that hold this keeper's weights."""
    _KEEPERS.add(keeper)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))


def forget(keeper: StepKeeper) -> None:
    """Stop following optimisers for a keeper; the last keeper removes the hook."""
    _KEEPERS.discard(keeper)
    if not _KEEPERS:
        while _HOOKS:
            _HOOKS.pop().remove()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for keeper in list(_KEEPERS):
        keeper.after_step(held)
