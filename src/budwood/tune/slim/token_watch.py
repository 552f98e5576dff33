"""Hooks on the model around SLIM layers, which note what is padding and what is supervised."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from budwood.tune.data.encoding import IGNORED
from budwood.tune.slim.latest import Latest
from budwood.tune.slim.trainer_labels import trained_labels, trainer_with_masks


class TokenWatch:
    """A forward pre-hook that notes the attention mask and labels of the model that it is on.

    Both hold until the thread's next forward pass, since gradient checkpointing repeats parts of a
    pass in backward. So with ``use_reentrant=True``, two forward passes before one backward share
    the mask and labels of the second.

    Args:
        model: the model to hook.
        parent: the watch of the model around it. It is asked for labels, and for the mask if only a
            4-D one arrives here.
    """

    def __init__(self, model: nn.Module, parent: TokenWatch | None = None) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self._positions = {
            name: parameters.index(name)
            for name in ("attention_mask", "labels")
            if name in parameters
        }
        self.parent = parent
        self.outermost: nn.Module = model if parent is None else parent.outermost
        self.is_decoder = _is_decoder_of(self.outermost, model)
        self.predicts_next = _predicts_next(model) if parent is None else parent.predicts_next
        self._mask_given: Latest[Tensor | None] = Latest()
        self._labels_given: Latest[Tensor | None] = Latest()
        self.of_trainer: tuple[Tensor | None, bool] = (None, False)
        self._warned = self._graph_checked = self._in_graph = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.note_inputs(args, kwargs)
        if self.parent is None and module.training and torch.is_grad_enabled():
            self._in_graph = torch.compiler.is_compiling()
            self.of_trainer = trained_labels()

    @property
    def mask(self) -> Tensor | None:
        """The attention mask of this thread's pass, shape (batch, length); None for none."""
        return self._mask_given.get()

    @property
    def labels(self) -> Tensor | None:
        """The labels of this thread's pass, shape (batch, length); None for none."""
        return self._labels_given.get()

    def note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model is called with; pruning calls this again with fewer tokens."""
        mask = self._argument("attention_mask", args, kwargs)
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = self._from_parents("mask")
        labels = self._argument("labels", args, kwargs)
        shifted = kwargs.get("shift_labels")
        if labels is None and isinstance(shifted, Tensor):  # each at the token before
            labels = F.pad(shifted, (1, 0), value=IGNORED)[:, :-1]
        if labels is None:
            labels = self._from_parents("labels")
        if self.is_decoder and mask is None and labels is not None:
            mask = labels != IGNORED  # a decoder's token i predicts label i
        self._mask_given.set(mask)
        self._labels_given.set(labels)

    def not_padding(self, x: Tensor) -> Tensor | None:
        """Find the tokens of a layer's input that are not padding.

        Args:
            x: shape (…, d_in).

        Returns:
            bool, shape (n_tokens,). None for all: there is no mask, or none of this size, as in a
            layer that sees other tokens (routed, pooled) than the model.
        """
        n_tokens = x.shape[:-1].numel()
        mask = self.mask
        if mask is None:
            return None
        if x.ndim == 3 and mask.shape[0] == x.shape[0] and mask.shape[1] > x.shape[1]:
            mask = mask[:, -x.shape[1] :]  # a cache holds the earlier tokens
        if mask.numel() != n_tokens:
            return None
        return mask.reshape(-1).to(x.device) > 0

    def supervised(
        self, x: Tensor, told: Tensor | None = None, *, warn: bool = False
    ) -> Tensor | None:
        """Find the tokens of a layer's input whose next token has a label.

        Labels are, in this order: those by the masks of the trainer around; those that the model
        was given; those told; those that the trainer around keeps to itself.

        Args:
            x: shape (batch, length, d_in), or flattened, shape (batch · length, d_in).
            told: labels of :func:`budwood.tune.tell_labels`; shape (batch, length), or of the last
                positions only.
            warn: warn once if a language model's labels are missing or do not fit.

        Returns:
            bool, shape (n_tokens,). What :meth:`not_padding` returns if there are no labels, if
            they have another size, or if the model's labels are not next tokens.
        """
        kept = self.not_padding(x)
        if not self.predicts_next:
            return kept
        labels = self._labels(told)
        shape = self._batch_shape(x, labels)
        if labels is None or shape is None or not _fit(labels, shape):
            if warn:
                self._warn(labels, x)
            return kept
        labelled = torch.zeros(shape, dtype=torch.bool, device=x.device)
        n_before = shape[1] - labels.shape[1]
        labelled[:, n_before:-1] = labels[:, 1:].to(x.device) != IGNORED
        labelled = labelled.reshape(-1)
        return labelled if kept is None else labelled & kept

    def _labels(self, told: Tensor | None) -> Tensor | None:
        of_trainer, first = self._root.of_trainer
        ways = (of_trainer if first else None, self.labels, told, of_trainer)
        return next((labels for labels in ways if labels is not None), None)

    def _warn(self, labels: Tensor | None, x: Tensor) -> None:
        root = self._root
        if root._warned or not isinstance(root.outermost, PreTrainedModel):
            return
        root._warned = True
        why = "without labels"
        if labels is not None:
            why = f"with labels of shape {tuple(labels.shape)} for {x.shape[:-1].numel()} tokens"
        warnings.warn(
            f"SLIM: a layer is trained {why}, so all tokens but padding count as training data; "
            "call budwood.tune.tell_labels(model, labels) before each forward pass, or set "
            'fit_on="all" if all should count',
            UserWarning,
            stacklevel=2,
        )

    def check_graph(self) -> None:
        """Warn once if ``torch.compile`` hid the masks of the trainer around."""
        root = self._root
        if not root._in_graph or root._graph_checked:
            return
        root._graph_checked = True
        name = trainer_with_masks()
        if name is not None:
            warnings.warn(
                f"SLIM: torch.compile hides the masks of {name}, so that rejected answers and the "
                "output of tools count as training data; leave out torch_compile",
                UserWarning,
                stacklevel=2,
            )

    @property
    def _root(self) -> TokenWatch:
        """The watch of the outermost model."""
        return self if self.parent is None else self.parent._root

    def _batch_shape(self, x: Tensor, labels: Tensor | None) -> tuple[int, int] | None:
        """Batch and length of a layer's tokens, which some models flatten; None if unknown."""
        if x.ndim == 3:
            return x.shape[0], x.shape[1]
        for like in (self.mask, labels):
            if like is not None and like.ndim == 2 and like.numel() == len(x):
                return like.shape[0], like.shape[1]
        return None

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, position = kwargs.get(name), self._positions.get(name)
        if value is None and position is not None and len(args) > position:
            return args[position]
        return value

    def _from_parents(self, name: str) -> Tensor | None:
        """What the nearest model around this one was given; some heads skip a model between."""
        watch = self.parent
        while watch is not None and getattr(watch, name) is None:
            watch = watch.parent
        return None if watch is None else getattr(watch, name)


def watch_tokens(model: nn.Module, kind: type[nn.Module]) -> dict[nn.Module, TokenWatch]:
    """Hook the outermost model, and each transformers model inside, that holds some layers.

    Args:
        model: the outermost model.
        kind: class of the layers.

    Returns:
        Layer → the innermost watch around it.
    """
    watches: dict[nn.Module, TokenWatch] = {}
    around: dict[nn.Module, TokenWatch] = {}
    for module in model.modules():  # parents come before their children
        is_model = module is model or isinstance(module, PreTrainedModel)
        layers = [part for part in module.modules() if isinstance(part, kind)] if is_model else []
        if not layers:
            continue
        watch = _watch_on(module)
        if watch is None:
            watch = TokenWatch(module, around.get(module))
            module.register_forward_pre_hook(watch, with_kwargs=True)
        for part in module.modules():
            if part is not module:
                around[part] = watch
        watches.update(dict.fromkeys(layers, watch))
    return watches


def unwatch_tokens(model: nn.Module) -> None:
    """Remove the hooks of :func:`watch_tokens` from a model and all its parts."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, TokenWatch):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def _watch_on(module: nn.Module) -> TokenWatch | None:
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, TokenWatch)), None)


def _fit(labels: Tensor, shape: tuple[int, int]) -> bool:
    """Whether labels fit tokens of shape (batch, length), or the last ones of each row."""
    return labels.ndim == 2 and len(labels) == shape[0] and 0 < labels.shape[1] <= shape[1]


def _predicts_next(model: nn.Module) -> bool:
    """Whether the labels of a model are next tokens.

    They are not in encoder–decoders, whose labels are other tokens than the encoder's, nor in
    models that classify tokens or fill masks.
    """
    if not isinstance(model, PreTrainedModel):
        return True
    return model.can_generate() and not model.config.is_encoder_decoder


def _is_decoder_of(outermost: nn.Module, module: nn.Module) -> bool:
    """Whether a module is the decoder of an encoder–decoder."""
    if not isinstance(outermost, PreTrainedModel) or not outermost.config.is_encoder_decoder:
        return False
    return outermost.get_decoder() is module
