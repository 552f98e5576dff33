"""Which tokens are padding, told to the layers by the model around them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


class PaddingWatch:
    """A forward pre-hook that notes the attention mask of the model that it is on.

    The mask stays in force until the next forward pass, since gradient checkpointing repeats parts
    of the pass in backward, after it has ended. With ``use_reentrant=True``, two forward passes
    before one backward therefore share the later one's mask.

    Args:
        model: the model to be hooked.
        parent: the watch of the model around it, asked where only a 4-D mask arrives here.
    """

    def __init__(self, model: nn.Module, parent: PaddingWatch | None = None) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self.place = parameters.index("attention_mask") if "attention_mask" in parameters else None
        self.parent = parent
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and self.place is not None and len(args) > self.place:
            mask = args[self.place]
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            self.mask = mask
        else:
            self.mask = None if self.parent is None else self.parent.mask

    def keep(self, x: Tensor) -> Tensor | None:
        """The tokens of a layer's input that are no padding.

        Args:
            x: shape (…, d_in).

        Returns:
            bool of shape (n_tokens,), None for all: no mask, or none of this size, as in a layer
            that sees other tokens (routed, pooled) than the model does.
        """
        n_tokens = x.shape[:-1].numel()
        if self.mask is None:
            return None
        mask = self.mask
        if x.ndim == 3 and mask.shape[0] == x.shape[0] and mask.shape[1] > x.shape[1]:
            mask = mask[:, -x.shape[1] :]  # a cache holds the earlier tokens
        if mask.numel() != n_tokens:
            return None
        return mask.reshape(-1).to(x.device) > 0


def hook_of(module: nn.Module, kind: type) -> Any:
    """The forward pre-hook of a class that is on a module, None if there is none."""
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, kind)), None)


def remove_hooks(model: nn.Module, *kinds: type) -> None:
    """Take the forward pre-hooks of some classes off a model and all its parts."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, kinds):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def watches(model: nn.Module, kind: type[nn.Module]) -> dict[nn.Module, PaddingWatch]:
    """Put a watch on each transformers model that holds layers of a class, and on the outermost.

    Args:
        model: the outermost model.
        kind: class of the layers.

    Returns:
        The innermost watch around each layer.
    """
    from transformers import PreTrainedModel

    found: dict[nn.Module, PaddingWatch] = {}
    around: dict[nn.Module, PaddingWatch] = {}
    for module in model.modules():  # parents come before their children
        hosts = module is model or isinstance(module, PreTrainedModel)
        inside = [one for one in module.modules() if isinstance(one, kind)] if hosts else []
        if not inside:
            continue
        watch = hook_of(module, PaddingWatch)
        if watch is None:
            watch = PaddingWatch(module, around.get(module))
            module.register_forward_pre_hook(watch, with_kwargs=True)
        for part in module.modules():
            if part is not module:
                around[part] = watch
        found.update(dict.fromkeys(inside, watch))
    return found
