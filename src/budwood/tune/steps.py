"""Optimiser steps: when statistics are taken up and new masks are drawn."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from budwood.errors import AttachError
from budwood.tune.state import Clusters, check_finite

if TYPE_CHECKING:
    from budwood.tune.fitting import Survey
    from budwood.tune.layer import SlimLinear
    from budwood.tune.observe import Recorder

PATIENCE = 1000
"""Backward passes without a noticed optimiser step before a warning."""


class StepKeeper:
    """Notices optimiser steps, and commits what was gathered since the last one.

    PyTorch calls a hook after every ``optimizer.step()``; a keeper whose weights that optimiser
    holds commits there. So plain loops and trainers need do nothing, and what is saved after a step
    is complete. Over several ranks a commit is one all-reduce, in a place that all ranks reach.

    Args:
        model: the model that holds the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorder: Recorder | None = None
        self.labels: Tensor | None = None
        self.survey: Survey | None = None
        self._seen: dict[tuple[str, str], int] = {}
        self._warned = False
        _follow(self)

    @property
    def pending(self) -> bool:
        """Whether a backward pass was noted since the last commit."""
        return bool(self._seen)

    def is_first(self, layer: str, adapter: str) -> bool:
        """Whether a layer's next backward pass is its first in this step: the penalty is due."""
        return not self._seen.get((layer, adapter))

    def on_backward(self, layer: str, adapter: str) -> bool:
        """Note a backward pass of a layer; whether it was the first in this step."""
        first = self.is_first(layer, adapter)
        n_passes = self._seen[layer, adapter] = self._seen.get((layer, adapter), 0) + 1
        if n_passes > PATIENCE:
            self._warn()
        return first

    def after_step(self, held: set[int]) -> None:
        """Commit what an optimiser that holds parameters with these ids has updated."""
        if self.pending:
            self.commit(held)

    def commit(self, held: set[int] | None = None) -> bool:
        """Take up the statistics gathered since the last commit, and draw the next masks.

        Args:
            held: ids of the parameters of what is committed; None for all.

        Returns:
            Whether there was anything to take up.

        Raises:
            DivergedError: a layer's inputs were NaN or infinite; nothing is taken up.
        """
        mine = [
            (layer, name)
            for layer in self.layers()
            for name in layer.slim_in
            if held is None or held & {id(layer.slim_in[name]), id(layer.slim_out[name])}
        ]
        # An adapter as a whole: which of its layers saw a token may differ between ranks.
        trained = {name for layer, name in mine if (layer.slim_key, name) in self._seen}
        mine = [(layer, name) for layer, name in mine if name in trained]
        for layer, name in mine:
            self._seen.pop((layer.slim_key, name), None)
        reduce_and_commit(
            [layer.slim_clusters[name] for layer, name in mine if name in layer.slim_clusters]  # type: ignore[misc]
        )
        for layer, name in mine:
            if name in layer.slim_mask:
                layer.slim_mask[name].commit()  # type: ignore[operator]
        return bool(mine)

    def forget_gathered(self) -> None:
        """Drop what was gathered since the last commit."""
        self._seen.clear()
        for layer in self.layers():
            for clusters in layer.slim_clusters.values():
                clusters.pending = None  # type: ignore[assignment]

    def layers(self) -> list[SlimLinear]:
        """All SLIM layers of the model, in its order."""
        return layers_of(self.model)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"SLIM: {PATIENCE} backward passes and no optimiser step was noticed: add "
                "SlimCallback() or call budwood.tune.commit(model) after each step",
                UserWarning,
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _follow(self)


def reduce_and_commit(clusters: list[Clusters]) -> None:
    """Sum the gathered moments over ranks in one all-reduce, and move the statistics by them.

    Raises:
        DivergedError: moments are NaN or infinite; no statistics are changed.
    """
    if not clusters:
        return
    parts = [one.taken() for one in clusters]
    sizes = [len(part) for part in parts]
    flat = torch.cat([part.to(parts[0].device) for part in parts])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    check_finite(flat, [one.key for one in clusters], sizes)
    for one, part in zip(clusters, flat.split(sizes)):
        one.commit(part)


def layers_of(model: nn.Module) -> list[SlimLinear]:
    """All SLIM layers in a model, wrapped or not, in its order."""
    from budwood.tune.layer import SlimLinear

    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def keeper_of(model: nn.Module) -> StepKeeper:
    """The keeper of a model, wrapped or not.

    Raises:
        AttachError: the model has no SLIM layers.
    """
    layers = layers_of(model)
    if not layers:
        raise AttachError("the model has no SLIM layers; make it with peft.get_peft_model first")
    return layers[0].keeper


def commit(model: nn.Module) -> bool:
    """Take up the statistics of an optimiser step now, and draw the masks of the next.

    Happens by itself with any ``torch.optim.Optimizer`` that holds the adapter's parameters. Call
    it after each step, on every rank, with an optimiser of another kind.

    Args:
        model: a model with SLIM layers, wrapped or not.

    Returns:
        Whether there was anything to take up.

    Raises:
        AttachError: the model has no SLIM layers.
        DivergedError: a layer's inputs were NaN or infinite.
    """
    return keeper_of(model).commit()


def tell_labels(model: nn.Module, labels: Tensor | None) -> None:
    """Say which tokens are learnt, where the model's forward pass is not given the labels.

    With ``fit_on="learnt"`` statistics are those of tokens whose next one is learnt. A model that
    is called with ``labels`` knows them; a loop that computes the loss by itself calls this before
    each forward pass, or else all tokens but padding count.

    Args:
        model: a model with SLIM layers, wrapped or not.
        labels: −100 where nothing is learnt, shape (batch, length), or of the last positions only;
            in force until others are told. None for no labels.

    Raises:
        AttachError: the model has no SLIM layers.
    """
    keeper_of(model).labels = labels


_KEEPERS: weakref.WeakSet[StepKeeper] = weakref.WeakSet()
_HOOKS: list[Any] = []


def _follow(keeper: StepKeeper) -> None:
    _KEEPERS.add(keeper)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))


def forget(keeper: StepKeeper) -> None:
    """Stop following optimisers for a keeper; the last one takes the hook with it."""
    _KEEPERS.discard(keeper)
    if not _KEEPERS:
        while _HOOKS:
            _HOOKS.pop().remove()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    for keeper in list(_KEEPERS):
        keeper.after_step(held)
