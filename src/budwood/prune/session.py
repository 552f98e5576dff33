"""Attach pruning to a model and detach it again. ``generate`` is called as before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from budwood.checks import need_seed
from budwood.errors import AttachError, InputError
from budwood.prune.budget import Budget
from budwood.prune.encoded import Encoded
from budwood.prune.families import family_of
from budwood.prune.generation import (
    PromptSwap,
    pad_token,
    prompt_mask,
    refuse_impossible,
    refuse_inputs,
    shorten_limits,
)
from budwood.prune.methods.base import Method
from budwood.prune.methods.scores import Common
from budwood.prune.pruner import Pruner
from budwood.prune.question import Question, QuestionRule
from budwood.prune.report import ImageReport, Timing
from budwood.prune.selection import resolve_method
from budwood.unwrap import innermost

_ABSENT = object()


def attach(
    model: Any,
    *,
    method: str | Method = "adav",
    keep: int | float = 64,
    compat: str | None = None,
    question: QuestionRule = "all",
    forward: bool = False,
    seed: int = 0,
    processor: Any = None,
    timing: bool = False,
    encoded: Encoded | None = None,
) -> PruneSession:
    """Prune the visual tokens of every image that ``model.generate`` is called with.

    Use it as a context manager, or call ``detach()`` on the session. ``generate`` takes the same
    inputs and returns the same shape of output as before: the whole prompt, then the answer. Its
    per-step extras (``attentions``, ``hidden_states``, ``past_key_values``) belong to the pruned
    prompt. Calls without images, or with ``inputs_embeds``, pass through. Weights are not touched.

    With ``forward=True`` a call ``model(**inputs)`` is pruned too, ``labels`` in step, so that loss
    and log-likelihood are right. Its ``logits`` then have shape (batch, n_kept, vocabulary), one
    row per token that stayed: ``session.origin`` says which those are, and in a batch padded on the
    left the last ones are the prompt's last ones, as ever. Without it such a call is untouched.

    Reading the prompts costs one small device-to-host copy per call; choosing costs none.

    Args:
        model: a transformers model of a family in ``FAMILIES``; may be wrapped by PEFT or carry
            accelerate hooks.
        method: a name in ``METHODS``, or an instance.
        keep: tokens per image (int), or a fraction of them (float in (0, 1]). An image that has no
            more keeps all, and the report says so.
        compat: ``"official"`` is an alias: ``method="adav"`` with it is ``method="adav-official"``.
        question: which text counts as the question; ``"all"`` (the published choice), ``"turn"`` or
            a function, see :class:`budwood.prune.question.Question`.
        forward: prune plain calls of the model as well.
        seed: for methods that draw. An image's draw depends on it and on its number in the call.
        processor: the model's processor. With it, ``question="turn"`` leaves out the chat
            template's words, and the report's boxes allow for cropped pictures.
        timing: wait for the GPU so that ``session.timing`` is exact there.
        encoded: the pictures of every call, from :func:`budwood.prune.encode`; the vision encoder
            then does not run.

    Returns:
        The session, with ``report`` and ``timing`` of the last call.

    Raises:
        UnsupportedModelError: no family knows the model, or it has no vision.
        AttachError: the model is attached to already, or ``encoded`` is for other methods.
        UnknownNameError: unknown method, ``compat`` or ``question``.
        BudgetError: ``keep`` is neither a count nor a ratio.
        InputError: ``seed`` is out of range.
    """
    need_seed(seed)
    model = innermost(model)
    _refuse_attached(model)
    chosen = resolve_method(method, compat)
    family = family_of(model, processor, chosen.whole_crops)
    if encoded is not None and encoded.whole_crops != family.whole_crops:
        raise AttachError(
            f"method {chosen.name!r} cannot use these encoded pictures; encode them with "
            f"encode(model, inputs, method={chosen.name!r})"
        )
    if chosen.needs_vocabulary:
        chosen = chosen.fitted(Common.of_model(model))
    pruner = Pruner(
        model,
        family,
        chosen,
        Budget.parse(keep),
        Question.for_model(question, model, family.wrapping_ids, processor),
        seed,
        timing,
        encoded,
    )
    return PruneSession(pruner, forward)


class PruneSession:
    """Pruning attached to one model; made by :func:`attach`.

    Attributes:
        model: the model whose methods are overridden: the innermost one, without wrappers.
        pruner: what is done to its calls.
        timing: of the last call; zeros if it had no images.
        origin: of the last call, position in the given prompt of each token that the LLM saw, -1
            for padding, int64, shape (batch, n_kept); None if it had no images.

    Args:
        pruner: what is done to the calls.
        forward: whether to plain calls of the model as well.
    """

    def __init__(self, pruner: Pruner, forward: bool = False) -> None:
        self.model = pruner.model
        self.pruner = pruner
        self._saved: dict[str, Any] = {}
        self._forget()
        self._override("generate", self._generate)
        if forward:
            self._override("forward", self._forward)

    # Attached and detached

    def __enter__(self) -> PruneSession:
        if not self._saved:
            raise AttachError("this session is detached; call attach() for a new one")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was found. The report stays readable; twice does no harm."""
        if not self._saved:
            return
        for name, before in self._saved.items():
            if before is _ABSENT:
                delattr(self.model, name)
            else:
                setattr(self.model, name, before)
        self._saved = {}
        self.pruner.family.release()

    def _override(self, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(self.model, name)
        names = [
            parameter.name
            for parameter in inspect.signature(original).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]

        # transformers reads the signature of both methods, so it has to stay visible.
        @functools.wraps(original)
        def overridden(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, {**dict(zip(names, args, strict=False)), **kwargs})

        overridden.budwood_session = self  # type: ignore[attr-defined]
        self._saved[name] = self.model.__dict__.get(name, _ABSENT)
        setattr(self.model, name, overridden)

    # What the last call did

    @property
    def report(self) -> list[ImageReport]:
        """What was kept in the last call, one entry per image in the order of the batch.

        Raises:
            InputError: on a GPU, where it is not waited for in the call: features had NaN.
        """
        for number, fine in enumerate(self._usable):
            if not fine:
                raise InputError(
                    f"features or saliency of image {number} are not finite; check the image, the "
                    "dtype (float16 overflows) and the weights"
                )
        return self._report

    def _forget(self) -> None:
        self._report: list[ImageReport] = []
        self._usable: list[Tensor] = []
        self.timing = Timing()
        self.origin: Tensor | None = None

    # The two overridden methods

    def _generate(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        self._forget()
        ids = _prompts_with_images(kwargs)
        if ids is None:
            return original(**kwargs)
        refuse_impossible(kwargs, self.model)
        refuse_inputs(kwargs, self.pruner.family.video_inputs)
        mask = kwargs.get("attention_mask")
        kwargs.pop("inputs", None)
        kwargs["input_ids"] = ids
        kwargs["attention_mask"] = prompt_mask(ids, kwargs, self.model) if mask is None else mask
        with torch.no_grad():
            cut = self._cut(kwargs, pad_token(kwargs, self.model))
        n_pruned = cut["input_ids"].shape[1]
        swap = PromptSwap(ids, n_pruned)
        shorten_limits(cut, self.model, ids.shape[1] - n_pruned)
        swap.wrap(cut)
        output = original(**cut)
        if isinstance(output, Tensor):
            return swap.restore(output)
        if isinstance(getattr(output, "sequences", None), Tensor):
            output.sequences = swap.restore(output.sequences)
        return output

    def _forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        ids = _prompts_with_images(kwargs)
        if ids is None:  # among others every step inside generate()
            return original(**kwargs)
        self._forget()
        refuse_inputs(kwargs, self.pruner.family.video_inputs)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(ids)
        cut = self._cut(kwargs, pad_token({}, self.model))
        for hook in self.model._forward_pre_hooks.values():  # they saw the whole prompt
            if hasattr(hook, "note_inputs"):
                hook.note_inputs((), cut)
        return original(**cut)

    def _cut(self, inputs: dict[str, Any], pad: int) -> dict[str, Any]:
        cut = self.pruner.cut(inputs, pad)
        self._report, self._usable = cut.report, cut.usable
        self.timing, self.origin = cut.timing, cut.origin
        return cut.inputs


def _prompts_with_images(kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids if there are images to prune; None for all that passes through as it came."""
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs")
    pixels = kwargs.get("pixel_values")
    encoded = kwargs.get("inputs_embeds") is not None or bool(kwargs.get("mm_encoder_outputs"))
    if encoded or not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    return ids if pixels is not None and len(pixels) > 0 else None


def _refuse_attached(model: Any) -> None:
    held = getattr(getattr(model, "__dict__", {}).get("generate"), "budwood_session", None)
    if held is not None:
        raise AttachError(
            f"{type(model).__name__} is attached to already (method {held.pruner.method.name!r}, "
            f"keep={held.pruner.budget.keep}); detach that session first"
        )
