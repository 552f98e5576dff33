"""Optimiser steps: when statistics are taken up and new masks are drawn."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from budwood.errors import AttachError
from budwood.tune.padding import hook_of, remove_hooks
from budwood.tune.state import Clusters, check_finite, version

if TYPE_CHECKING:
    from budwood.tune.layer import SlimLinear
    from budwood.tune.observe import Recorder

PATIENCE = 1000
"""Backward passes without a noticed optimiser step before a warning."""


class StepKeeper:
    """Notices optimiser steps, and commits what was gathered since the last one.

    A step shows in the version counters of the weights, which an optimiser that updates in place
    raises. It is looked for before each forward pass and before the state is saved, so that plain
    loops and trainers need do nothing. Over several ranks the commit is one all-reduce, done before
    a training pass (which all ranks run) and never while saving; :func:`commit` does it earlier.

    Args:
        model: the model that holds the layers; this is a forward pre-hook on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorder: Recorder | None = None
        self.pending = False
        self._penalised: set[tuple[int, str]] = set()
        self._versions: int | None = None
        self._n_waiting = 0
        self._warned = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        training = self.model.training and torch.is_grad_enabled()
        if not self.pending:
            if training:
                self._versions = self._count()
        elif self._stepped():
            if training or not _distributed():
                self.commit()
        elif training:
            self._wait()

    def before_save(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """A state-dict pre-hook: take up what the last step left, so that it is saved."""
        if not (self.pending and self._stepped()):
            return
        if _distributed():
            self._warn(
                "the statistics of the last step are not in what is being saved: with several "
                "ranks, add SlimCallback() or call budwood.tune.commit(model) after each step"
            )
        else:
            self.commit()

    def on_backward(self, layer: SlimLinear, adapter: str) -> bool:
        """Note a backward pass of a layer; whether its L1 penalty is due in this step."""
        self.pending = True
        key = (id(layer), adapter)
        if key in self._penalised:
            return False
        self._penalised.add(key)
        return True

    def commit(self) -> bool:
        """Take up the statistics gathered since the last commit, and draw the next masks.

        Call it on every rank or on none.

        Returns:
            Whether there was anything to take up.

        Raises:
            InputError: a layer's inputs were NaN or infinite; nothing is taken up.
        """
        if not self.pending and not _distributed():
            return False
        layers = self.layers()
        active = [(layer, name) for layer in layers for name in layer.trained_adapters()]
        clusters = [
            layer.slim_clusters[name] for layer, name in active if name in layer.slim_clusters
        ]
        self._start_step()
        reduce_and_commit(clusters)
        for layer, name in active:
            if name in layer.slim_mask:
                layer.slim_mask[name].commit()
        self._versions = self._count()
        return True

    def layers(self) -> list[SlimLinear]:
        """All SLIM layers of the model, in its order."""
        from budwood.tune.layer import SlimLinear

        return [module for module in self.model.modules() if isinstance(module, SlimLinear)]

    def _start_step(self) -> None:
        self.pending = False
        self._penalised.clear()
        self._n_waiting = 0

    def _stepped(self) -> bool:
        return self._versions is not None and self._count() != self._versions

    def _count(self) -> int:
        """Sum of the version counters of all trained weights."""
        return sum(
            version(parameter)
            for layer in self.layers()
            for name in layer.trained_adapters()
            for parameter in (layer.slim_in[name], layer.slim_out[name])
        )

    def _wait(self) -> None:
        self._n_waiting += 1
        if self._n_waiting >= PATIENCE:
            self._warn(
                f"{PATIENCE} backward passes and no optimiser step was noticed; some optimisers "
                "hide it: add SlimCallback() or call budwood.tune.commit(model) after each step"
            )

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"SLIM: {text}", UserWarning, stacklevel=3)


def reduce_and_commit(clusters: list[Clusters]) -> None:
    """Sum the gathered moments over ranks in one all-reduce, and move the statistics by them.

    Raises:
        InputError: moments are NaN or infinite; no statistics are changed.
    """
    if not clusters:
        return
    parts = [one.taken() for one in clusters]
    sizes = [len(part) for part in parts]
    flat = torch.cat([part.to(parts[0].device) for part in parts])
    if _distributed():
        dist.all_reduce(flat)
    check_finite(flat, [one.key for one in clusters], sizes)
    for one, part in zip(clusters, flat.split(sizes)):
        one.commit(part)


def keeper_of(model: nn.Module) -> StepKeeper | None:
    """The keeper somewhere in a model, wrapped or not; None without SLIM layers."""
    found = (hook_of(module, StepKeeper) for module in model.modules())
    return next((keeper for keeper in found if keeper is not None), None)


def ensure_keeper(model: nn.Module) -> StepKeeper:
    """The keeper of a model, put on it if there is none."""
    keeper = keeper_of(model)
    if keeper is None:
        keeper = StepKeeper(model)
        model.register_forward_pre_hook(keeper, with_kwargs=True)
        model.register_state_dict_pre_hook(keeper.before_save)
    return keeper


def remove_keeper(model: nn.Module) -> None:
    """Take the keeper off a model again, if there is one."""
    for module in model.modules():
        for number, hook in list(module._state_dict_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), StepKeeper):
                del module._state_dict_pre_hooks[number]
    remove_hooks(model, StepKeeper)


def commit(model: nn.Module) -> bool:
    """Take up the statistics of an optimiser step now, and draw the masks of the next.

    Not needed in a single process, where it happens by itself. Over several ranks, call it on every
    rank after ``optimizer.step()`` if checkpoints must hold the last step; :class:`SlimCallback`
    does so under a ``Trainer``.

    Args:
        model: a model with SLIM layers, wrapped or not.

    Returns:
        Whether there was anything to take up.

    Raises:
        AttachError: the model has no SLIM layers.
        InputError: a layer's inputs were NaN or infinite.
    """
    keeper = keeper_of(model)
    if keeper is None:
        raise AttachError("the model has no SLIM layers; make it with peft.get_peft_model first")
    return keeper.commit()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
