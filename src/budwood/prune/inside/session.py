"""Drop visual tokens between layers of a Llama decoder, by the attention of the last token.

Attention stays whatever it is (SDPA, FlashAttention, eager). The one row that is needed is computed
beside it: the query is recorded where the layer projects it, the keys are those of the cache.

Kept tokens keep their positions, as in the published code. The cache of later layers is shorter
than that of the first ones, and masks are cut to each layer's own columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from budwood import catalogue
from budwood.errors import AttachError, InputError, UnsupportedModelError
from budwood.prune.budget import Budget
from budwood.prune.inside.schedules import Schedule, per_layer
from budwood.prune.methods.scores import descending
from budwood.prune.saliency import rotate
from budwood.registry import Registry
from budwood.spec import build
from budwood.unwrap import innermost

SCHEDULES = Registry("method", catalogue.INSIDE_METHODS)
"""Schedules by name."""
_MODELS = ("llava", "llava_next")


@dataclass(eq=False)
class InsideReport:
    """What the layers of the LLM saw of one prompt.

    Attributes:
        n_visual: visual tokens of the prompt, newlines included.
        per_layer: visual tokens that each layer sees.
        kept: layer → visual tokens, numbered from 0, that it and later ones see, int64, sorted.
    """

    n_visual: int
    per_layer: tuple[int, ...]
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """Visual tokens that a layer sees on average."""
        return sum(self.per_layer) / len(self.per_layer)


@dataclass(eq=False)
class _Prompt:
    """A prompt that layers drop tokens of.

    Attributes:
        visual: places of its visual tokens, int64.
        length: its tokens.
        drops: layer → visual tokens left from there on.
        report: what was done.
        columns: layer → places in the prompt that it and later ones see, int64, sorted.
        query: of the last token, in the layer before a drop.
    """

    visual: Tensor
    length: int
    drops: dict[int, int]
    report: InsideReport
    columns: dict[int, Tensor] = field(default_factory=dict)
    query: Tensor | None = None

    def seen_by(self, layer: int) -> Tensor | None:
        """Places that a layer sees; None for all."""
        passed = [at for at in self.columns if at <= layer]
        return self.columns[max(passed)] if passed else None


class InsideSession:
    """Pruning inside the LLM, attached to one model; made by :func:`attach_inside`.

    Attributes:
        model: the model that has the hooks.
        schedule: when tokens are dropped.
        keep: the budget.
    """

    def __init__(self, model: Any, schedule: Schedule, keep: Budget) -> None:
        self.model, self.schedule, self.keep = model, schedule, keep
        self._layers: list[Any] = list(model.model.language_model.layers)
        self._here = threading.local()
        self._by_cache = WeakIdKeyDictionary()
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True),
            model.register_forward_hook(_Hook(self._end), always_call=True),
        ]
        for number, layer in enumerate(self._layers):
            before = _Hook(partial(self._before_layer, number))
            query = _Hook(partial(self._note_query, number))
            self._hooks += [
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.self_attn.q_proj.register_forward_hook(query),
            ]

    @property
    def report(self) -> InsideReport | None:
        """Report on this thread's last prompt with visual tokens; None before the first."""
        return getattr(self._here, "report", None)

    def detach(self) -> None:
        """Remove the hooks. Calling it twice is safe."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> InsideSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    # A call of the model

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._here.prompt, self._here.reading = None, False
        ids = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        n_cached = 0 if cache is None else int(cache.get_seq_length())
        image_token = self.model.config.image_token_id
        if ids is None or not (ids == image_token).any():
            self._here.prompt = self._by_cache.get(cache) if n_cached else None
            return
        if n_cached:
            raise InputError(
                f"{self.schedule.name} cannot read an image behind {n_cached} cached tokens; "
                "give the whole prompt at once, with an empty cache"
            )
        self._refuse(ids, kwargs)
        self._here.prompt, self._here.reading = self._prompt(ids), True

    def _end(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self._here.prompt = None

    def _refuse(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        name = self.schedule.name
        if len(ids) != 1:
            raise InputError(
                f"{name} reads one prompt at a time and got {len(ids)} rows; call it with one row, "
                "without beam search and num_return_sequences"
            )
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache") is False or getattr(cache, "is_compileable", False):
            given = "no cache" if cache is None else type(cache).__name__
            raise InputError(
                f"{name} needs a dynamic cache and got {given}; leave use_cache and "
                "cache_implementation as they are"
            )
        by_position = isinstance(kwargs.get("logits_to_keep"), Tensor)
        if kwargs.get("labels") is not None or by_position:
            given = "logits_to_keep as positions" if by_position else "labels"
            raise InputError(
                f"{name} drops tokens inside the LLM, so logits no longer match {given}; leave "
                "them out, or prune before the LLM with attach(..., forward=True)"
            )

    def _prompt(self, ids: Tensor) -> _Prompt:
        visual = (ids[0] == self.model.config.image_token_id).nonzero().flatten()
        n_visual, n_layers = len(visual), len(self._layers)
        drops = self.schedule.drops(n_layers, n_visual, self.keep.count(n_visual, clamp=True))
        report = InsideReport(n_visual, tuple(per_layer(drops, n_layers, n_visual)))
        self._here.report = report
        return _Prompt(visual, ids.shape[1], drops, report)

    # A call of a layer

    def _note_query(self, layer: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """Note the query of the last token in a layer before a drop."""
        prompt = getattr(self._here, "prompt", None)
        if prompt is not None and self._here.reading and layer + 1 in prompt.drops:
            prompt.query = output[0, -1:].detach()

    def _before_layer(
        self, layer: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Drop tokens where the schedule says so, and cut what comes with them."""
        prompt = getattr(self._here, "prompt", None)
        if prompt is None:
            return None
        reading = self._here.reading
        if reading and layer in prompt.drops:
            inside = self._drop(prompt, layer, kwargs)
            args = (args[0][:, inside], *args[1:])
        columns = prompt.seen_by(layer)
        if columns is None:
            return None
        return args, _cut(kwargs, columns, prompt.length, reading)

    def _drop(self, prompt: _Prompt, layer: int, kwargs: dict[str, Any]) -> Tensor:
        """Choose what stays from a layer on; places among what the layer before it saw."""
        cache = kwargs["past_key_values"]
        self._by_cache[cache] = prompt
        before = prompt.seen_by(layer)
        if before is None:
            before = torch.arange(prompt.length, device=prompt.visual.device)
        assert prompt.query is not None  # the layer before has run
        attention = self._layers[layer - 1].self_attn
        cos, sin = (table[0, -1:] for table in kwargs["position_embeddings"])
        keys = cache.layers[layer - 1].keys[0]
        query = rotate(prompt.query, cos, sin, attention.config.num_attention_heads)
        mask = _last_row(kwargs.get("attention_mask"), before)
        row = last_token_attention(query[0], keys, attention.scaling, mask)

        is_visual = torch.isin(before, prompt.visual)
        # Text stays: it ranks before everything.
        order = descending(row.masked_fill(~is_visual, torch.inf))
        n_text = prompt.length - len(prompt.visual)
        inside = order[: n_text + prompt.drops[layer]].sort().values
        prompt.columns[layer] = before[inside]
        kept = torch.isin(prompt.visual, prompt.columns[layer])
        prompt.report.kept[layer] = kept.nonzero().flatten()
        return inside


class _Hook:
    """A hook of a session. A copy of the model gets one that does nothing.

    Args:
        call: what to do.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (_Hook, "nothing")

    @staticmethod
    def nothing(*_args: Any) -> None:
        """Do nothing."""


def attach_inside(
    model: Any, *, method: str | Schedule = "fastv", keep: int | float = 0.5
) -> InsideSession:
    """Prune visual tokens inside the LLM, for comparison with methods that prune before it.

    For LLaVA and LLaVA-NeXT with a Llama decoder, one prompt at a time, with a dynamic cache. After
    some layers the visual tokens that the prompt's last token attends to least, mean over heads,
    are dropped for all later layers. Every visual token of the prompt is a candidate, newlines and
    all images together. Text stays. ``generate`` is called as before. The logits of a direct call
    are those of the tokens that stay. The session is a context manager.

    Args:
        model: a transformers model; may be wrapped by PEFT.
        method: ``"fastv"`` or ``"pyramiddrop"``, also with parameters, such as
            ``"fastv:layer=3"``, or a schedule.
        keep: visual tokens of a prompt, an int, or a fraction of them, a float in (0, 1]; by
            default a mean over layers, see :class:`Schedule`.

    Raises:
        UnsupportedModelError: another model, or another decoder.
        UnknownNameError: an unknown method.
        InputError: ``method`` is neither a name nor a schedule. At the call: several rows, no
            dynamic cache, an image behind a cache, ``labels``, or ``logits_to_keep`` as positions.
        BudgetError: ``keep`` is neither a count nor a fraction. At the call: it is less than the
            layers before the first drop take.
        AttachError: pruning inside is attached already.
    """
    model = innermost(model)
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    decoder = getattr(getattr(config, "text_config", None), "model_type", None)
    if kind not in _MODELS or decoder != "llama":
        raise UnsupportedModelError(
            f"pruning inside the LLM is for {' and '.join(_MODELS)} with a Llama decoder, and this "
            f"is {kind!r} with {decoder!r}; choose a method that prunes before it (attach)"
        )
    if any(isinstance(hook, _Hook) for hook in model._forward_pre_hooks.values()):
        raise AttachError(
            f"{type(model).__name__} prunes inside already; detach that session first"
        )
    if isinstance(method, str):
        method = build(method, SCHEDULES)
    if not isinstance(method, Schedule):
        raise InputError(
            f"method={method!r} is not a schedule; give one of {', '.join(SCHEDULES)}, or an "
            "instance such as FastV(layer=3)"
        )
    return InsideSession(model, method, Budget.parse(keep))


def last_token_attention(
    query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of one query to all keys, mean over heads.

    Args:
        query: rotated, shape (n_heads · d_head,).
        keys: rotated, shape (n_key_heads, n_tokens, d_head); n_heads is a multiple of n_key_heads.
        scaling: factor on the logits.
        mask: added to the logits, float, or where they count, bool, shape (n_tokens,).

    Returns:
        Probabilities, float32, shape (n_tokens,).
    """
    n_key_heads, _, d_head = keys.shape
    grouped = query.float().view(n_key_heads, -1, d_head)
    logits = grouped @ keys.float().transpose(1, 2) * scaling
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask.float()
    return logits.softmax(-1).mean((0, 1))


def _last_row(mask: Any, columns: Tensor) -> Tensor | None:
    if mask is None:
        return None
    return mask[0, 0, -1, columns] if mask.ndim == 4 else mask[0, columns].bool()


def _cut(kwargs: dict[str, Any], columns: Tensor, n_prompt: int, reading: bool) -> dict[str, Any]:
    """Cut what a layer is called with to the places of the prompt that it sees.

    Later tokens, which are read one or some at a time, are all seen.
    """
    cut = dict(kwargs)
    if reading:
        cos, sin = kwargs["position_embeddings"]
        cut["position_embeddings"] = cos[:, columns], sin[:, columns]
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = kwargs["position_ids"][:, columns]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor):
        new = torch.arange(n_prompt, mask.shape[-1], device=columns.device)
        mask = mask[..., torch.cat((columns, new))]
        cut["attention_mask"] = mask[..., columns, :] if reading and mask.ndim == 4 else mask
    return cut
