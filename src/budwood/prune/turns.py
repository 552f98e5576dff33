"""A later turn of a chat: the cache holds a pruned prompt, the new prompt is whole."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor

from budwood.errors import AttachError, InputError

_NOTE = "budwood_prompt"
Counts: TypeAlias = dict[str, tuple[int, ...]]
"""``"image"`` and ``"video"`` → how many there are in each row of a batch."""

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """The prompt whose tokens a cache holds. It is noted on the cache, and copied with it.

    Attributes:
        whole: the prompt as the user gave it, int64, shape (batch, n_tokens).
        inputs: what the model was called with in its place: ``input_ids``, ``attention_mask`` and,
            where positions do not count the kept tokens, ``position_ids``; shapes
            (..., batch, n_kept).
        n_visuals: images, and videos, in each row.
        owner: the model that filled the cache.
    """

    whole: Tensor
    inputs: dict[str, Tensor]
    n_visuals: Counts
    owner: Owner

    @classmethod
    def of(cls, whole: Tensor, cut: dict[str, Any], n_visuals: Counts, model: Any) -> CachedPrompt:
        """Of a prompt and the keyword arguments of the call that its pruned version went into."""
        inputs = {
            name: cut[name] for name in (*_PER_TOKEN, "position_ids") if cut.get(name) is not None
        }
        return cls(whole, inputs, n_visuals, Owner(model))

    @classmethod
    def of_text(cls, ids: Tensor, mask: Tensor, model: Any) -> CachedPrompt:
        """Of a prompt without images, which the model got as it is."""
        inputs = {"input_ids": ids, "attention_mask": mask}
        return cls(ids, inputs, {}, Owner(model))

    @property
    def n_seen(self) -> int:
        """Tokens of the whole prompt."""
        return self.whole.shape[1]

    @property
    def n_kept(self) -> int:
        """Tokens of the pruned one."""
        return self.inputs["input_ids"].shape[1]

    @property
    def n_all(self) -> int:
        """Images and videos of all rows."""
        return sum(map(sum, self.n_visuals.values()))

    def note(self, cache: Any, caches: Caches) -> None:
        """Write it on a cache; None and caches that are plain tuples are left alone.

        Args:
            cache: of transformers.
            caches: of the session. The cache is added, and each deep copy of it.
        """
        if hasattr(cache, "__dict__"):
            setattr(cache, _NOTE, _Note(self, cache, caches))
            vars(cache).pop("get_seq_length", None)  # see `_orphan`
            caches.add(cache)

    def step(self, call: dict[str, Any]) -> dict[str, Any]:
        """What a step of decoding by hand needs that follows this prompt: a mask and positions.

        Args:
            call: keyword arguments, with ``past_key_values`` and ``input_ids`` or embeddings. Its
                ``attention_mask`` is for the whole prompt and what follows, or for the pruned one.

        Returns:
            ``attention_mask`` and ``position_ids`` for the pruned prompt; nothing for a cache of
            another batch size, and no positions where some are given.
        """
        new = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        n_cached, mask, fixed = length_of(call["past_key_values"]), call.get("attention_mask"), {}
        if len(new) != len(self.whole) or n_cached < self.n_kept:
            return {}
        pruned = self.inputs["attention_mask"].to(new.device)
        behind = pruned.new_ones(len(new), n_cached - self.n_kept + new.shape[1])
        if mask is not None and mask.ndim == 2:
            if mask.shape[1] == self.n_seen + behind.shape[1]:
                behind = mask[:, self.n_seen :]
                fixed["attention_mask"] = torch.cat((pruned.to(mask), behind), dim=1)
            elif mask.shape[1] == self.n_kept + behind.shape[1]:
                behind = mask[:, self.n_kept :]
        if call.get("position_ids") is None:
            # As generate() does it: what is not attended to has no position.
            steps = behind.long().cumsum(-1)[:, -new.shape[1] :] - 1
            positions = self.next_position.to(new.device) + steps
            if "position_ids" in self.inputs and self.inputs["position_ids"].ndim == 3:
                at = pruned.long().sum(-1, keepdim=True) + steps
                n_axes = len(self.inputs["position_ids"]) - 1
                positions = torch.cat((at[None], positions.expand(n_axes, -1, -1)))
            fixed["position_ids"] = positions
        return fixed

    def before(self, call: dict[str, Any], pad: int, fills: Mapping[str, int]) -> dict[str, Any]:
        """A plain call with a filled cache, which gives new tokens alone, with those before them.

        Args:
            call: keyword arguments of ``forward``. Its ``attention_mask`` is for the whole prompt
                and what follows, or for the pruned one, or None if all tokens count.
            pad: stands for tokens that were decoded by hand, which are not known.
            fills: of other inputs with an entry per token, what stands before the new ones.

        Raises:
            AttachError: the cache holds less than this prompt.
            InputError: the mask has another length.
        """
        new, n_cached = call["input_ids"], length_of(call["past_key_values"])
        if n_cached < self.n_kept or len(new) != len(self.whole):
            raise AttachError(
                f"past_key_values holds {n_cached} tokens of the {self.n_kept} of its pruned "
                f"prompt, {len(self.whole)} rows; input_ids has {len(new)} rows; start from an "
                "empty cache"
            )
        n_between = n_cached - self.n_kept
        between = new.new_full((len(new), n_between), pad)
        whole = call | {"input_ids": torch.cat((self.whole.to(new), between, new), dim=1)}
        n_behind = n_between + new.shape[1]
        mask = call.get("attention_mask")
        mask = torch.ones_like(whole["input_ids"]) if mask is None else mask
        if mask.shape[1] not in (self.n_seen + n_behind, self.n_kept + n_behind):
            raise InputError(
                f"attention_mask has {mask.shape[1]} columns; with this cache give "
                f"{self.n_seen + n_behind}, for the whole prompt and what follows"
            )
        seen = torch.ones_like(self.whole).to(mask)  # what the cache holds is masked as it was
        whole["attention_mask"] = torch.cat((seen, mask[:, -n_behind:]), dim=1)
        n_before = self.n_seen + n_between
        for name, fill in fills.items():
            if name != "attention_mask" and call.get(name) is not None:
                whole[name] = torch.nn.functional.pad(call[name], (n_before, 0), value=fill)
        wanted = call.get("logits_to_keep")
        if isinstance(wanted, Tensor):  # counted from the first new token
            whole["logits_to_keep"] = torch.where(wanted < 0, wanted, wanted + n_before)
        return whole

    def held(
        self, ids: Tensor, mask: Tensor, n_cached: int, placeholders: Sequence[int]
    ) -> CachedPrompt:
        """The part of a longer prompt that the cache holds: this prompt and its answer.

        Args:
            ids: the whole new prompt, int64, shape (batch, n_tokens + n_new).
            mask: its attention mask.
            n_cached: tokens that the cache holds.
            placeholders: of images and videos.

        Raises:
            AttachError: the prompt does not begin with this one, or has nothing new, or the cache
                ends inside an image.
        """
        n_tokens = self.n_seen
        begins = ids.shape[0] == self.whole.shape[0] and torch.equal(
            ids[:, :n_tokens], self.whole.to(ids.device)
        )
        if not begins:
            raise AttachError(
                f"past_key_values belongs to another prompt (shape {tuple(self.whole.shape)}); "
                f"input_ids (shape {tuple(ids.shape)}) must begin with that prompt and its answer, "
                "as generate() returned them; start from an empty cache otherwise"
            )
        if ids.shape[1] - n_tokens + self.n_kept <= n_cached:
            raise AttachError(
                f"past_key_values already holds all of input_ids ({n_cached} tokens); add the next "
                "turn, or start from an empty cache"
            )
        if _any_of(self.inputs["input_ids"][:, n_cached:], placeholders):
            raise AttachError(
                f"past_key_values was cropped to {n_cached} tokens, which ends before or inside an "
                "image; start from an empty cache"
            )
        n_seen = n_tokens + max(0, n_cached - self.n_kept)
        return self.extended(ids[:, :n_seen], mask[:, :n_seen])

    def extended(self, ids: Tensor, mask: Tensor) -> CachedPrompt:
        """A prompt that begins with this one and goes on with text."""
        new, after = ids[:, self.n_seen :], mask[:, self.n_seen :]
        positions = self.inputs.get("position_ids")
        if positions is not None:  # text continues behind the largest coordinate, on all axes alike
            steps = after.long().cumsum(-1) - 1
            n_axes = len(_axes(positions))
            positions = (self.next_position + steps).expand(n_axes, -1, -1)
        more = {"input_ids": new, "attention_mask": after}
        return CachedPrompt(ids, self.followed(more, positions), self.n_visuals, self.owner)

    def followed(self, more: Mapping[str, Any], positions: Tensor | None) -> dict[str, Tensor]:
        """The inputs of the pruned prompt with more tokens behind it.

        Args:
            more: ``input_ids``, ``attention_mask`` and perhaps kinds of tokens for these tokens,
                shape (batch, n_new).
            positions: their coordinates, shape (n_axes, batch, n_new); None where positions count
                the kept tokens.

        Returns:
            The same and perhaps ``position_ids``, of shape (..., batch, n_kept + n_new). Kinds of
            tokens that either part came without are 0: text.
        """
        device, joined = more["input_ids"].device, {}
        for name in _PER_TOKEN:
            if more.get(name) is not None or name in self.inputs:
                before = self.inputs.get(name, torch.zeros_like(self.inputs["input_ids"]))
                behind = more.get(name, torch.zeros_like(more["input_ids"]))
                joined[name] = torch.cat((before.to(behind), behind), dim=1)
        if positions is not None:
            before = self.coordinates(len(positions)).to(device)
            positions = torch.cat((before, positions.to(device)), dim=-1)
            joined["position_ids"] = position_ids(positions, joined["attention_mask"])
        return joined

    def coordinates(self, n_axes: int) -> Tensor:
        """Coordinates of the pruned prompt, int64, shape (n_axes, batch, n_kept)."""
        if "position_ids" in self.inputs:
            return _axes(self.inputs["position_ids"])
        return counted(self.inputs["attention_mask"]).expand(n_axes, -1, -1)

    @property
    def next_position(self) -> Tensor:
        """The coordinate behind the largest, int64, shape (batch, 1)."""
        return self.coordinates(1).amax((0, 2))[:, None] + 1


class _Note:
    """A prompt on a cache. A deep copy of the cache gets a note too, and its session knows it.

    Args:
        prompt: what the cache holds.
        cache: that it is on.
        caches: of the session; None after unpickling, like the cache.
    """

    def __init__(self, prompt: CachedPrompt, cache: Any, caches: Caches | None) -> None:
        self.prompt, self._caches = prompt, caches
        self._cache = None if cache is None else weakref.ref(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Note:
        cache = None if self._cache is None else memo.get(id(self._cache()))
        if cache is not None and self._caches is not None:
            self._caches.add(cache)
        return _Note(copy.deepcopy(self.prompt, memo), cache, self._caches)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Note, (self.prompt, None, None)


class Caches:
    """Caches that hold a pruned prompt of one session, as long as they live."""

    def __init__(self) -> None:
        self._held: WeakSet[Any] = WeakSet()
        self._lock = threading.Lock()

    def add(self, cache: Any) -> None:
        """Remember a cache."""
        with self._lock:
            self._held.add(cache)

    def orphan(self) -> None:
        """Make all refuse to be used, and forget them: their session is detached."""
        with self._lock:
            held, self._held = list(self._held), WeakSet()
        for cache in held:
            _orphan(cache)


class Owner:
    """The model that filled a cache, remembered without keeping it alive.

    Args:
        model: None where it is not known, as after unpickling.
    """

    def __init__(self, model: Any = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def refuse_other(self, model: Any) -> None:
        """Raise AttachError if the cache is another model's."""
        if self._model is not None and self._model() is not model:
            raise AttachError(
                "past_key_values was filled by another model; start from an empty cache"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, ()


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return False
    return length_of(cache) > 0


def length_of(cache: Any) -> int:
    """Tokens that a cache holds, also if its session is detached."""
    return int(type(cache).get_seq_length(cache))


def cached_prompt(cache: Any, model: Any) -> CachedPrompt | None:
    """What is noted on a cache, if it holds anything.

    Raises:
        AttachError: another model filled it.
    """
    held = _noted(cache) if is_filled(cache) else None
    if held is not None:
        held.owner.refuse_other(model)
    return held


def _noted(cache: Any) -> CachedPrompt | None:
    note = getattr(cache, _NOTE, None)
    return None if note is None else note.prompt


def unpruned_prompt(
    cache: Any, ids: Tensor, mask: Tensor, model: Any, placeholders: Collection[int]
) -> CachedPrompt:
    """What a cache without a note holds, which no pruned call has filled: text, token by token.

    Raises:
        AttachError: it holds images.
    """
    ids, mask = (tensor[:, : length_of(cache)] for tensor in (ids, mask))
    if _any_of(ids, placeholders):
        raise AttachError(
            "past_key_values holds images that this session has not pruned; start from an empty "
            "cache, or detach"
        )
    return CachedPrompt.of_text(ids, mask, model)


def _any_of(ids: Tensor, tokens: Collection[int]) -> bool:
    return bool(torch.isin(ids, torch.tensor(sorted(tokens), device=ids.device)).any())


def _orphan(cache: Any) -> None:
    """Make a cache refuse to be used: it holds a pruned prompt and its session is detached."""
    held = _noted(cache)
    if held is not None and held.n_seen != held.n_kept:
        cache.get_seq_length = _refuse_orphan


def _refuse_orphan(*_: Any, **__: Any) -> int:
    raise AttachError(
        "past_key_values holds a pruned prompt and its session is detached; attach() again, or "
        "start from an empty cache"
    )


def new_pictures(
    visuals: Any, inputs: dict[str, Any], whole: Tensor, held: CachedPrompt, fresh: Tensor
) -> Iterator[dict[str, Any]]:
    """The inputs with the images of a later turn that may be the new ones, likely ones first.

    Processors give all images of a conversation, those that the cache holds among them; a user may
    give the new ones alone. The placeholders tell which it is, once images are encoded.

    Args:
        visuals: the model's images, or its videos.
        inputs: keyword arguments of the call, with the new placeholders alone in ``input_ids``.
        whole: the whole prompt, on the CPU, shape (batch, n_tokens).
        held: what the cache holds.
        fresh: whether each row has new placeholders, bool, shape (batch,).
    """
    counts = held.n_visuals.get(visuals.kind, (0,) * len(fresh))
    n_held, rows = sum(counts), int(fresh.sum())
    refused, all_given = None, {**inputs, "input_ids": whole}
    try:
        n_new = len(visuals.pictures(all_given)) - n_held
    except InputError:  # a family that tells its images apart by the prompt
        n_new = 0
    if n_held and (n_new == rows or n_new > rows == 1):
        which, start = [], 0
        for row, n_before in enumerate(counts):
            n_here = n_new if rows == 1 else 1
            stop = start + n_before + (n_here if fresh[row] else 0)
            which += range(start + n_before, stop)
            start = stop
        try:
            yield {**inputs, **visuals.only(all_given, which)}
        except AttachError as error:
            refused = error
    yield inputs
    if refused is not None:
        raise refused


def count_visuals(
    found: Iterable[tuple[str, int]], n_rows: int, held: CachedPrompt | None = None
) -> Counts:
    """Count images and videos: those of a call, each with its row, and those of the cache."""
    counts = {kind: list(rows) for kind, rows in held.n_visuals.items()} if held else {}
    for kind, row in found:
        counts.setdefault(kind, [0] * n_rows)[row] += 1
    return {kind: tuple(rows) for kind, rows in counts.items()}


def misfit(kind: str, n_new: int) -> InputError:
    """The error for images that do not fit the placeholders of a later turn."""
    return InputError(
        f"the new turn has {n_new} {kind} placeholders and the {kind}s given do not fit them; "
        f"give all {kind}s of the conversation, or only the new ones (always those for a "
        f"batch with several new {kind}s in a row)"
    )


def position_ids(positions: Tensor, mask: Tensor) -> Tensor:
    """Coordinates as a model takes them.

    A model with several axes gets counted positions in front, from which it builds its mask; gaps
    in them would pass for several packed sequences.

    Args:
        positions: coordinates, int64, shape (n_axes, batch, n_tokens).
        mask: attention mask, shape (batch, n_tokens).

    Returns:
        Shape (batch, n_tokens) for one axis, else (1 + n_axes, batch, n_tokens).
    """
    return positions[0] if len(positions) == 1 else torch.cat((counted(mask)[None], positions))


def _axes(ids: Tensor) -> Tensor:
    """The coordinates in what :func:`position_ids` made, shape (n_axes, batch, n_tokens)."""
    return ids[None] if ids.ndim == 2 else ids[1:]


def counted(mask: Tensor) -> Tensor:
    """Positions that count attended tokens, int64, shape (batch, n_tokens), as the mask."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
