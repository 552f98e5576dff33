"""Attach pruning to a model and detach it again. ``generate`` is called as before."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from budwood.caches import by_new_name, by_one_name, cache_of, takes_new_name
from budwood.catalogue import POSITIONS
from budwood.checks import need_seed
from budwood.errors import AttachError, InputError, UnknownNameError
from budwood.prune.budget import Budgets
from budwood.prune.bypass import Guard
from budwood.prune.encoded import Encoded
from budwood.prune.families import as_built, family_of
from budwood.prune.generation import (
    PromptSwap,
    flash_attention,
    loses_mask,
    pad_token,
    prompt_mask,
    refuse_explicit,
    refuse_impossible,
    refuse_inputs,
    refuse_unknown_video,
    shorten_limits,
)
from budwood.prune.methods.base import Method
from budwood.prune.methods.scores import Common
from budwood.prune.pruner import FILLS, Pruner
from budwood.prune.question import Question, QuestionRule
from budwood.prune.report import Call, ImageReport, Timing
from budwood.prune.selection import resolve_method
from budwood.prune.turns import (
    CachedPrompt,
    Caches,
    cached_prompt,
    is_filled,
    length_of,
    unpruned_prompt,
)
from budwood.unwrap import compiled_around, innermost, signature

_ABSENT = object()


def attach(
    model: Any,
    *,
    method: str | Method = "adav",
    keep: int | float | Sequence[int | float] = 64,
    compat: str | None = None,
    question: QuestionRule = "current",
    forward: bool = False,
    seed: int = 0,
    processor: Any = None,
    timing: bool = False,
    encoded: Encoded | None = None,
    patches: str = "mean",
    positions: str | None = None,
) -> PruneSession:
    """Prune the visual tokens of every image and video that ``model.generate`` is called with.

    Use it as a context manager, or call ``detach()`` on the session. ``generate`` takes the same
    inputs and returns the same shape of output as before: the whole prompt, then the answer. Its
    per-step extras (``attentions``, ``hidden_states``, ``past_key_values``) belong to the pruned
    prompt. Calls without images, or with ``inputs_embeds``, pass through. Weights are not touched.

    With ``forward=True`` a call ``model(**inputs)`` is pruned too, ``labels`` in step, so that loss
    and log-likelihood are right. Its ``logits`` then have shape (batch, n_kept, vocabulary), one
    row per token that stayed: ``session.origin`` says which those are, and in a batch padded on the
    left the last ones are the prompt's last ones. Without it such a call is untouched.

    Reading the prompts costs one small device-to-host copy per call; choosing costs none.

    Args:
        model: a transformers model of a family in ``FAMILIES``; may be wrapped by PEFT or carry
            accelerate hooks.
        method: a name in ``METHODS``, also with parameters, such as
            ``"adav:reserve=0.1+temperature=50"``, or an instance.
        keep: the budget of each image, for every family alike: a count of tokens (int), or a
            fraction of the image's candidates (float in (0, 1]), or a list with one of these for
            each image that a call prunes. An image's candidates are all its crops or tiles
            together, after the model's own merging. Only they count: fixed tokens, such as
            LLaVA-NeXT's newlines, come on top. An image with fewer candidates keeps them all. A
            video is one image. The report has all three counts.
        compat: ``"official"`` is an alias: ``method="adav"`` with it is ``method="adav-official"``.
        question: which text counts as the question: ``"current"``, the user's last turn;
            ``"turn"``, the turn of the image; ``"all"``, everything after the image, as published;
            or a function. See :class:`budwood.prune.question.Question`.
        forward: prune plain calls of the model as well.
        seed: for methods that draw. An image's draw depends on it and on its number in the call.
        processor: the model's processor. Give it for chats: with it the template's own words
            are left out of the question, and the report's boxes allow for cropped pictures.
        timing: wait for the GPU so that ``session.timing`` is exact there.
        encoded: the pictures of every call, from :func:`budwood.prune.encode`; the vision encoder
            then does not run.
        patches: how the patches that become one token make its saliency, on models that merge them
            (Qwen, 2×2): the ``"mean"`` or the ``"max"`` of the attention that they receive, or the
            mean ``"norm"`` of their features before the merger.
        positions: where the LLM sees what is kept. ``"original"``: each token stays at its position
            in the whole prompt, so that the LLM knows where in the picture it is. ``"compact"``:
            positions count what is left, as published methods have it. None: the method's own,
            ``"original"`` for ``adav+`` and ``"compact"`` for all others. Models with coordinates
            (Qwen) always have the original ones.

    Returns:
        The session, with ``report`` and ``timing`` of the last call.

    Raises:
        UnsupportedModelError: no family knows the model, or it has no vision.
        AttachError: the model is already attached to, or ``encoded`` is for other methods, or
            ``positions`` is not for this model.
        UnknownNameError: unknown method, ``compat``, ``question`` or ``positions``.
        BudgetError: ``keep`` is neither a count nor a fraction.
        InputError: ``seed`` is out of range, ``method`` says how many crops images have, or
            ``processor`` or ``encoded`` is something else.
    """
    need_seed(seed)
    _check_given(processor, encoded)
    model = innermost(model)
    _refuse_attached(model)
    check_positions(positions)
    chosen = resolve_method(method, compat)
    if chosen != chosen.for_crops(1):
        raise InputError(
            f"{chosen} says how many crops images have; leave n_crops out, it differs by image"
        )
    family = family_of(model, processor, chosen.whole_crops, patches)
    if positions == "compact" and family.has_coordinates:
        raise AttachError(
            f"positions='compact' is not for {model.config.model_type}, whose tokens have "
            "coordinates in the picture; leave it out"
        )
    if encoded is not None and encoded.whole_crops != family.whole_crops:
        raise AttachError(
            f"method {chosen.name!r} cannot use these encoded pictures; encode them with "
            f"encode(model, inputs, method={chosen.name!r})"
        )
    if encoded is not None and encoded.patches != patches:
        raise AttachError(
            f"the pictures are encoded with patches={encoded.patches!r}, and attach() has "
            f"patches={patches!r}; give both the same"
        )
    if chosen.needs_saliency and encoded is None:
        _refuse_compiled(family, chosen.name)
    if chosen.needs_vocabulary:
        chosen = chosen.fitted(Common.of_model(model))
    pruner = Pruner(
        model,
        family,
        chosen,
        Budgets.parse(keep),
        Question.for_model(question, model, family.wrapping_ids, processor),
        seed,
        timing,
        encoded,
        (positions or chosen.positions) == "original",
    )
    return PruneSession(pruner, forward)


class PruneSession:
    """Pruning attached to one model; made by :func:`attach`.

    Several threads may call the model at the same time. ``report``, ``timing`` and ``origin`` are
    those of the last call of the thread that asks; :meth:`call_of` has those of any other call.

    Attributes:
        model: the model whose methods are overridden: the innermost one, without wrappers.
        pruner: what is done to its calls.

    Args:
        pruner: what is done to the calls.
        forward: also prune plain calls of the model.
    """

    def __init__(self, pruner: Pruner, forward: bool = False) -> None:
        self.model = pruner.model
        self.pruner = pruner
        self._saved: dict[str, Any] = {}
        self._calls = Calls()
        self._caches = Caches()
        self._lock = threading.Lock()
        self._n_running = 0
        self._warned_of_video = False
        self._override("generate", self._generate)
        self._guard: Guard | None = None
        if forward:
            self._override("forward", self._forward)
            self._guard = Guard(self.model, self._has_visuals)

    # Attached and detached

    def __enter__(self) -> PruneSession:
        if not self.attached:
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
        """Restore the model. The report stays readable, and calling it twice is safe.

        Calls that run in other threads end as they began, pruned. Caches that hold a pruned prompt
        refuse to be used from then on, until a new session is attached.
        """
        with self._lock:
            saved, self._saved = self._saved, {}
            for name, before in saved.items():
                override = vars(self.model).get(name)
                if not isinstance(override, Override) or override.budwood_session is not self:
                    continue  # wrapped since: what holds the override goes on to the original
                if before is _ABSENT:
                    delattr(self.model, name)
                else:
                    setattr(self.model, name, before)
            if self._guard is not None:
                self._guard.remove()
            if saved and not self._n_running:
                self._release()

    @contextlib.contextmanager
    def running(self) -> Iterator[bool]:
        """Enclose a call of the model; yields whether the call is pruned.

        What a call changes in the model is put back when the last one has ended.
        """
        with self._lock:
            attached = bool(self._saved)
            self._n_running += attached
        try:
            yield attached
        finally:
            with self._lock:
                self._n_running -= attached
                if attached and not self._saved and not self._n_running:
                    self._release()

    def _release(self) -> None:
        self.pruner.family.release()
        self._caches.orphan()

    @property
    def attached(self) -> bool:
        """Whether calls of the model are pruned."""
        return bool(self._saved)

    def _override(self, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(self.model, name)
        self._saved[name] = self.model.__dict__.get(name, _ABSENT)
        setattr(self.model, name, Override(self, name, original, replacement))

    # What calls did

    def call_of(self, output: Any) -> Call:
        """The call that returned ``output``, or that wrote to it if it is a streamer.

        For servers: a request that runs in another thread is found by what it returned. Kept as
        long as the output itself.

        Args:
            output: what ``generate`` or the model returned, or the ``streamer`` it was given.

        Raises:
            InputError: no call of this session returned it.
        """
        return self._calls.of(output)

    @property
    def report(self) -> list[ImageReport]:
        """What was kept in this thread's last call, one entry per image or video.

        Raises:
            InputError: on a GPU, where it is not waited for in the call: features had NaN.
        """
        return self._calls.last.report

    @property
    def timing(self) -> Timing:
        """Timing of this thread's last call; zeros if it had no images."""
        return self._calls.last.timing

    @property
    def origin(self) -> Tensor | None:
        """Position in the given prompt of each token that the LLM saw in this thread's last call.

        -1 for padding, int64, shape (batch, n_kept); None if the call had no images.
        """
        return self._calls.last.origin

    # The two overridden methods

    def _generate(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        self._calls.begin()
        refuse_unknown_video(kwargs, self.model)
        cache = kwargs.get("past_key_values")
        ids, cached = _prompts(kwargs), cached_prompt(cache, self.model)
        if ids is None or (cached is None and not self._has_visuals(kwargs)):
            self._say_videos(kwargs)
            self._calls.note(kwargs.get("streamer"))
            return self._calls.note(original(**kwargs))
        refuse_impossible(kwargs, self.model)
        kwargs.pop("inputs", None)
        kwargs["input_ids"] = ids
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = prompt_mask(ids, kwargs, self.model)
        refuse_explicit(kwargs)
        if cached is None and is_filled(cache):
            placeholders = self.pruner.family.wrapping_ids
            cached = unpruned_prompt(cache, ids, kwargs["attention_mask"], self.model, placeholders)
        pad = pad_token(kwargs, self.model)
        with torch.no_grad():
            masked = loses_mask(kwargs, self.model)
            cut, prompt = (
                self._continued(kwargs, cached, pad, masked)
                if cached
                else self._cut(kwargs, pad, masked=masked)
            )
        prompt.note(cache, self._caches)
        n_pruned = cut["input_ids"].shape[1]
        swap = PromptSwap(ids, n_pruned)
        shorten_limits(cut, self.model, ids.shape[1] - n_pruned)
        self._calls.note(kwargs.get("streamer"))
        swap.wrap(cut)
        output = swap.restored(original(**cut))
        prompt.note(cache_of(output), self._caches)
        return self._calls.note(output)

    def _continued(
        self, kwargs: dict[str, Any], cached: CachedPrompt, pad: int, masked: bool
    ) -> tuple[dict[str, Any], CachedPrompt]:
        """A later turn: what the cache holds stays as it was, new images are pruned."""
        family, ids, mask = self.pruner.family, kwargs["input_ids"], kwargs["attention_mask"]
        n_cached = length_of(kwargs["past_key_values"])
        held = cached.held(ids, mask, n_cached, [visuals.token_id for visuals in family.kinds])
        fresh, is_new = ids[:, held.n_seen :], False
        for visuals in family.kinds:
            n_new = int((fresh == visuals.token_id).sum())
            if n_new and not visuals.given(kwargs):
                raise InputError(
                    f"the new turn has {n_new} {visuals.kind} placeholders and no {visuals.kind} "
                    f"is given; give all {visuals.kind}s of the conversation, or only the new ones"
                )
            is_new |= n_new > 0
        if is_new:
            return self._cut(kwargs, pad, held, masked)
        self._calls.last = Call(n_cached_images=held.n_all)
        prompt = held.extended(ids, mask)
        given = family.without_pictures({**kwargs, **prompt.inputs})
        for name in ("mm_token_type_ids", "token_type_ids"):
            given.pop(name, None)
        return given, prompt

    def _forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        refuse_unknown_video(kwargs, self.model)
        cache = kwargs.get("past_key_values")
        ids, cached = _prompts(kwargs), cached_prompt(cache, self.model)
        if ids is None or not self._has_visuals(kwargs):
            if cached is not None:
                cached.note(cache, self._caches)
                kwargs |= cached.step(kwargs)
            return original(**kwargs)
        self._calls.begin()
        refuse_explicit(kwargs)
        pad, held, n_cached = pad_token({}, self.model), None, 0
        if is_filled(cache):
            if cached is None:
                raise AttachError(
                    "past_key_values was filled by a call without images, and forward() does not "
                    "say what it holds; call generate(), or start from an empty cache"
                )
            cached.note(cache, self._caches)
            kwargs, n_cached = cached.before(kwargs, pad, FILLS), length_of(cache)
            n_new = ids.shape[1]
            held = cached.extended(
                kwargs["input_ids"][:, :-n_new], kwargs["attention_mask"][:, :-n_new]
            )
        elif kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(ids)
        cut, prompt = self._cut(kwargs, pad, held, flash_attention(self.model))
        if cut.get("position_ids") is None:  # counted as generate() counts them
            cut["position_ids"] = (cut["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        for name in ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids"):
            if cut.get(name) is not None:
                cut[name] = cut[name][..., n_cached:]
        for hook in self.model._forward_pre_hooks.values():  # they saw the whole prompt
            if hasattr(hook, "note_inputs"):
                hook.note_inputs((), cut)
        output = original(**cut)
        prompt.note(cache_of(output), self._caches)
        return self._calls.note(output)

    def _cut(
        self,
        inputs: dict[str, Any],
        pad: int,
        held: CachedPrompt | None = None,
        masked: bool = False,
    ) -> tuple[dict[str, Any], CachedPrompt]:
        """Prune the images of a call that no cache holds, and say what a cache then holds."""
        refuse_inputs(inputs, self.pruner.family.has_whole_video(inputs))
        if held is not None:
            self.pruner.family.refuse_later(len(held.whole))
        cut = self.pruner.cut(inputs, pad, held, masked)
        n_held = held.n_all if held else 0
        self._calls.last = Call(cut.report, cut.usable, cut.timing, cut.origin, False, n_held)
        return cut.inputs, CachedPrompt.of(
            inputs["input_ids"], cut.inputs, cut.n_visuals, self.model
        )

    def _has_visuals(self, kwargs: dict[str, Any]) -> bool:
        return bool(self.pruner.family.visuals(kwargs))

    def _say_videos(self, kwargs: dict[str, Any]) -> None:
        """Warn once that a video goes to the LLM whole, and note it for the report."""
        if self.pruner.family.has_whole_video(kwargs):
            self._calls.last = Call(whole_video=True)
            if not self._warned_of_video:
                warnings.warn("videos are not pruned: all their tokens are kept", stacklevel=4)
            self._warned_of_video = True


class Override:
    """A method of one model in place of its own, with the same signature.

    A copy or pickle of the model gets the class's own method: it is not attached.

    Attributes:
        budwood_session: the session that it belongs to.
    """

    def __init__(
        self,
        session: PruneSession,
        name: str,
        original: Callable[..., Any],
        replacement: Callable[..., Any],
    ) -> None:
        # transformers reads the signature of both methods, so it has to stay visible.
        functools.update_wrapper(self, original)
        self.budwood_session = session
        self._name, self._original, self._replacement = name, original, replacement
        self._new_name = takes_new_name(session.model)
        self._names = [
            parameter.name
            for parameter in signature(original).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.budwood_session.running() as attached:
            if not attached:
                return self._original(*args, **kwargs)
            named = {**dict(zip(self._names, args, strict=False)), **kwargs}
            if self._new_name:
                return self._replacement(by_new_name(self._original), by_one_name(named))
            return self._replacement(self._original, named)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.budwood_session.model, self._name)


class Calls:
    """The calls of a session: the last one of each thread, and those whose output still lives."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self._by_output = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    @property
    def last(self) -> Call:
        """The last call of this thread."""
        return getattr(self._threads, "call", None) or Call()

    @last.setter
    def last(self, call: Call) -> None:
        self._threads.call = call

    def begin(self) -> None:
        """Start a call in this thread, of which nothing is known yet."""
        self._threads.call = Call()

    def note(self, output: Any) -> Any:
        """Remember that this thread's last call belongs to ``output``, and return that."""
        with self._lock, contextlib.suppress(TypeError):  # None and others have no weak references
            self._by_output[output] = self.last
        return output

    def of(self, output: Any) -> Call:
        """The call behind an output; see :meth:`PruneSession.call_of`."""
        with self._lock, contextlib.suppress(TypeError):
            if output in self._by_output:
                return self._by_output[output]
        raise InputError(
            f"no call of this session returned this {type(output).__name__}; give the very object "
            "that generate() returned, or the streamer that it was given"
        )


def _prompts(kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids of prompts; None for calls that pass through as they came."""
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs")
    encoded = kwargs.get("inputs_embeds") is not None or bool(kwargs.get("mm_encoder_outputs"))
    return None if encoded or not isinstance(ids, Tensor) or ids.ndim != 2 else ids


def check_positions(positions: str | None) -> None:
    """Check where the LLM is to see what is kept.

    Raises:
        UnknownNameError: it is none of ``POSITIONS``, nor None.
    """
    if positions not in (None, *POSITIONS):
        known = ", ".join(POSITIONS)
        raise UnknownNameError(f"unknown positions {positions!r}; known: {known}")


def _check_given(processor: Any, encoded: Any) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    if processor is not None and not hasattr(tokenizer, "all_special_ids"):
        raise InputError(
            f"processor is a {type(processor).__name__}; give the model's processor, as "
            "AutoProcessor.from_pretrained returns it"
        )
    if not isinstance(encoded, Encoded | None):
        raise InputError(f"encoded is a {type(encoded).__name__}; give what encode() returns")


def _refuse_attached(model: Any) -> None:
    held = getattr(getattr(model, "__dict__", {}).get("generate"), "budwood_session", None)
    if held is not None:
        raise AttachError(
            f"{type(model).__name__} is already attached to (method {held.pruner.method.name!r}, "
            f"keep={held.pruner.budgets.keep}); detach that session first"
        )


def _refuse_compiled(family: Any, method: str) -> None:
    with as_built(type(family.model).__name__):
        read = family.recorder({}).module
    name = compiled_around(family.model.base_model, read)
    if name is not None:
        raise AttachError(
            f"{name} is compiled, which hides the attention that method {method!r} reads; compile "
            "the language model alone, or choose a method without saliency (budwood ls methods)"
        )
