"""Which tokens are padding and which are learnt, told to the layers by the model around them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from budwood.tune.encoding import IGNORED


class TokenWatch:
    """A forward pre-hook that notes attention mask and labels of the model that it is on.

    Both stay in force until the next forward pass, since gradient checkpointing repeats parts of
    the pass in backward, after it has ended. With ``use_reentrant=True``, two forward passes before
    one backward therefore share the later one's.

    Args:
        model: the model to be hooked.
        parent: the watch of the model around it, asked for labels, and for the mask where only a
            4-D one arrives here.
    """

    def __init__(self, model: nn.Module, parent: TokenWatch | None = None) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self._places = {
            name: parameters.index(name)
            for name in ("attention_mask", "labels")
            if name in parameters
        }
        self.parent = parent
        self.outermost: nn.Module = model if parent is None else parent.outermost
        self.answers = is_second_half(model, self.outermost)
        self.shifts = predicts_next(model) if parent is None else parent.shifts
        self.mask: Tensor | None = None
        self.labels: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.note_inputs(args, kwargs)

    def note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model is called with; again, by whoever calls it with other inputs."""
        mask = self._argument("attention_mask", args, kwargs)
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            self.mask = mask
        else:
            self.mask = self._above("mask")
        self.labels = self._argument("labels", args, kwargs)
        if self.labels is None:
            self.labels = self._above("labels")
        if self.answers and self.mask is None and self.labels is not None:
            self.mask = self.labels != IGNORED  # a decoder's token i is there to predict label i

    def _above(self, name: str) -> Tensor | None:
        """What the nearest model around this one was given; some heads skip a model between."""
        watch = self.parent
        while watch is not None and getattr(watch, name) is None:
            watch = watch.parent
        return None if watch is None else getattr(watch, name)

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

    def learnt(self, x: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """The tokens of a layer's input whose next token is learnt.

        Args:
            x: shape (batch, length, d_in), or flattened, shape (batch · length, d_in).
            labels: used where the model was given none; shape (batch, length), or of the last
                positions only.

        Returns:
            bool of shape (n_tokens,); without labels, with some of another size, or in a model
            whose labels are not of next tokens, what :meth:`keep` gives.
        """
        kept = self.keep(x)
        labels = self.labels if self.labels is not None else labels
        shape = self._shape(x, labels)
        if not self.shifts or labels is None or shape is None or not _fit(labels, shape):
            return kept
        found = torch.zeros(shape, dtype=torch.bool, device=x.device)
        n_before = shape[1] - labels.shape[1]
        found[:, n_before:-1] = labels[:, 1:].to(x.device) != IGNORED
        found = found.reshape(-1)
        return found if kept is None else found & kept

    def _shape(self, x: Tensor, labels: Tensor | None) -> tuple[int, int] | None:
        """Rows and columns of a layer's tokens, which some models flatten; None if unknown."""
        if x.ndim == 3:
            return x.shape[0], x.shape[1]
        for like in (self.mask, labels):
            if like is not None and like.ndim == 2 and like.numel() == len(x):
                return like.shape[0], like.shape[1]
        return None

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found, place = kwargs.get(name), self._places.get(name)
        if found is None and place is not None and len(args) > place:
            return args[place]
        return found


def _fit(labels: Tensor, shape: tuple[int, int]) -> bool:
    """Whether labels are those of tokens of a shape, or of the last ones of each row."""
    return labels.ndim == 2 and len(labels) == shape[0] and 0 < labels.shape[1] <= shape[1]


def predicts_next(model: nn.Module) -> bool:
    """Whether the labels of a model are those of next tokens.

    Not those of encoder–decoders, whose labels are other tokens than the encoder's, nor of models
    that classify tokens or fill masks.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return True
    return model.can_generate() and not model.config.is_encoder_decoder


def is_second_half(module: nn.Module, outermost: nn.Module) -> bool:
    """Whether a module is the decoder of an encoder–decoder."""
    from transformers import PreTrainedModel

    if not isinstance(outermost, PreTrainedModel) or not outermost.config.is_encoder_decoder:
        return False
    return outermost.get_decoder() is module


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


def watches(model: nn.Module, kind: type[nn.Module]) -> dict[nn.Module, TokenWatch]:
    """Put a watch on each transformers model that holds layers of a class, and on the outermost.

    Args:
        model: the outermost model.
        kind: class of the layers.

    Returns:
        The innermost watch around each layer.
    """
    from transformers import PreTrainedModel

    found: dict[nn.Module, TokenWatch] = {}
    around: dict[nn.Module, TokenWatch] = {}
    for module in model.modules():  # parents come before their children
        hosts = module is model or isinstance(module, PreTrainedModel)
        inside = [one for one in module.modules() if isinstance(one, kind)] if hosts else []
        if not inside:
            continue
        watch = hook_of(module, TokenWatch)
        if watch is None:
            watch = TokenWatch(module, around.get(module))
            module.register_forward_pre_hook(watch, with_kwargs=True)
        for part in module.modules():
            if part is not module:
                around[part] = watch
        found.update(dict.fromkeys(inside, watch))
    return found
