"""Batches whose rows use different adapters: ``model(..., adapter_names=[...])``, as in PEFT."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.tune.slim.keeper import SlimLayer, layers_of

BASE = "__base__"
"""PEFT's name for a row that uses no adapter."""
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values")
_ROUTED = re.compile(r"(^|\.)\w*experts\.\w*\d+\.")
"""A linear layer of one routed expert, which sees some of the tokens in an order of its own."""


@contextmanager
def rows_by_adapter(model: nn.Module, names: Any) -> Iterator[None]:
    """Let each row of the batches inside use an adapter of its own.

    Passes of other threads are left alone.

    Args:
        model: with SLIM layers, in evaluation mode. Calls of it have as many rows as names.
        names: of the adapters, one per row; ``"__base__"`` for none.

    Raises:
        InputError: the model is in training, a name is unknown, or there are none.
    """
    _check_names(model, names)
    kinds = (SlimLayer, AuxiliaryTrainingWrapper)
    layers = [one for one in model.modules() if isinstance(one, kinds)]
    tells = _InThisThread(functools.partial(_tell, list(names)))
    checks = _InThisThread(lambda _, args, kwargs: check_rows(names, args, kwargs))
    hooks = [one.register_forward_pre_hook(tells, with_kwargs=True) for one in layers]
    hooks.append(model.register_forward_pre_hook(checks, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_rows(names: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse another number of names than a call of the model has rows.

    Layers take multiples, since ``generate`` repeats rows for beams.

    Args:
        names: of the adapters.
        args: positional arguments of the call.
        kwargs: its keyword arguments.

    Raises:
        InputError: the numbers differ.
    """
    given = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
    batch = next((one for one in given if isinstance(one, Tensor)), None)
    if batch is not None and isinstance(names, Sequence) and len(names) != len(batch):
        raise InputError(
            f"adapter_names has {len(names)} names, and the batch {len(batch)} rows; give one name "
            "per row"
        )


def owners(x: Tensor, names: Sequence[str], key: str) -> Tensor:
    """Find the adapter of each row of a layer's input.

    Beams and returned sequences repeat each row in place, and some models join rows and tokens to
    one axis; so an axis that is k times as long as the names has k entries for each.

    Args:
        x: the layer's input, shape (n_rows, …, d_in) or (n_rows · length, d_in).
        names: one per row of the batch.
        key: name of the layer.

    Returns:
        Index into ``names`` for each entry of the first axis, int64, shape (len(x),).

    Raises:
        InputError: the first axis is no multiple of the names, or the layer is that of a routed
            expert, whose tokens have lost their rows.
    """
    if len(x) % len(names) or not len(x):
        raise InputError(
            f"adapter_names has {len(names)} names and layer {key!r} gets {len(x)} rows; give one "
            "name per row of the batch"
        )
    if _ROUTED.search(key):
        raise InputError(
            f"layer {key!r} sees routed tokens, whose rows are not known; run the rows of each "
            "adapter as a batch of their own, after model.set_adapter(name)"
        )
    index = torch.arange(len(names), device=x.device)
    return index.repeat_interleave(len(x) // len(names))


def groups(names: Sequence[str], known: Iterable[str]) -> dict[str, list[int]]:
    """List the rows of each adapter of ``known``, in the order of the names."""
    known = set(known)
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name in known:
            found.setdefault(name, []).append(i)
    return found


def _check_names(model: nn.Module, names: Any) -> None:
    if model.training:
        raise InputError(
            "adapter_names is for inference, and the model is in training: call eval()"
        )
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise InputError(f"adapter_names={names!r}; give a list with one name per row")
    known = {BASE, *(name for layer in layers_of(model) for name in layer.slim_config)}
    unknown = sorted({str(name) for name in names} - known)
    if unknown:
        raise InputError(
            f"adapter_names has {', '.join(unknown)}; the adapters are {', '.join(sorted(known))}"
        )


def _tell(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Hand the names to a layer; PEFT's own want one for each row."""
    if args and isinstance(module, AuxiliaryTrainingWrapper):
        names = [names[i] for i in owners(args[0], names, "modules_to_save").tolist()]
    return args, {**kwargs, "adapter_names": names}


class _InThisThread:
    """A forward pre-hook that leaves the passes of all threads but its maker's alone.

    Args:
        hook: called with the module, its arguments and its keyword arguments.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook, self._thread = hook, threading.get_ident()

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,  # None if the maker removes it at this moment
    ) -> Any:
        if threading.get_ident() != self._thread:
            return None
        return self._hook(module, args, kwargs)
