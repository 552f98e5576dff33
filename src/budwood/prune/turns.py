"""A later turn of a chat: the cache holds a pruned prompt, the new prompt is whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.errors import AttachError

_NOTE = "budwood_prompt"


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """The prompt whose tokens a cache holds. It is noted on the cache, and copied with it.

    Attributes:
        whole: the prompt as the user gave it, int64, shape (batch, n_tokens).
        inputs: what the model was called with in its place: ``input_ids``, ``attention_mask`` and,
            for models with coordinates, ``position_ids``; shapes (..., batch, n_kept).
    """

    whole: Tensor
    inputs: dict[str, Tensor]

    @classmethod
    def of(cls, whole: Tensor, cut: dict[str, Any]) -> CachedPrompt:
        """Of a prompt and the keyword arguments of the call that its pruned version went into."""
        names = ("input_ids", "attention_mask", "position_ids")
        return cls(whole, {name: cut[name] for name in names if cut.get(name) is not None})

    def note(self, cache: Any) -> None:
        """Write it on a cache; None and caches that are plain tuples are left alone."""
        if hasattr(cache, "__dict__"):
            setattr(cache, _NOTE, self)

    def mask(self, mask: Tensor, call: dict[str, Any]) -> Tensor:
        """The attention mask of a step of decoding by hand, for the cached and the new tokens.

        Args:
            mask: as given: for the whole prompt and what follows, or for the pruned one already.
            call: keyword arguments, with ``past_key_values`` and ``input_ids`` or embeddings.
        """
        new = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        n_expected = call["past_key_values"].get_seq_length() + new.shape[1]
        n_whole, n_kept = self.whole.shape[1], self.inputs["input_ids"].shape[1]
        if mask.ndim != 2 or mask.shape[1] != n_expected - n_kept + n_whole or n_whole == n_kept:
            return mask
        pruned = self.inputs["attention_mask"].to(mask.device, mask.dtype)
        return torch.cat((pruned, mask[:, n_whole:]), dim=1)

    def extended(self, ids: Tensor, mask: Tensor | None, n_cached: int) -> dict[str, Tensor]:
        """The pruned version of a prompt that begins with this one.

        Args:
            ids: the whole new prompt, int64, shape (batch, n_tokens + n_new).
            mask: its attention mask; None if all tokens count.
            n_cached: tokens that the cache holds.

        Returns:
            ``input_ids``, ``attention_mask`` and perhaps ``position_ids`` of shape
            (..., batch, n_kept + n_new).

        Raises:
            AttachError: it does not begin with the cached prompt, or has nothing new.
        """
        n_tokens = self.whole.shape[1]
        begins = ids.shape[0] == self.whole.shape[0] and torch.equal(
            ids[:, :n_tokens], self.whole.to(ids.device)
        )
        if not begins:
            raise AttachError(
                f"past_key_values belongs to another prompt (shape {tuple(self.whole.shape)}); "
                f"input_ids (shape {tuple(ids.shape)}) must begin with that prompt and its answer, "
                "as generate() returned them; start from an empty cache otherwise"
            )
        new = ids[:, n_tokens:]
        extended = {"input_ids": torch.cat((self.inputs["input_ids"].to(ids.device), new), dim=1)}
        if extended["input_ids"].shape[1] <= n_cached:
            raise AttachError(
                f"past_key_values already holds all of input_ids ({n_cached} tokens); add the next "
                "turn, or start from an empty cache"
            )
        before = self.inputs["attention_mask"].to(ids.device)
        after = torch.ones_like(new) if mask is None else mask[:, n_tokens:]
        extended["attention_mask"] = torch.cat((before, after.to(before.dtype)), dim=1)
        positions = self.inputs.get("position_ids")
        if positions is not None:
            # Text continues behind the largest coordinate, on all axes alike; see Pruner.cut for
            # the counted positions in front.
            steps = after.long().cumsum(-1)
            counted = before.long().sum(-1, keepdim=True) - 1 + steps
            behind = (positions[1:].amax((0, 2))[:, None] + steps).expand(3, -1, -1)
            behind = torch.cat((counted[None], behind))
            extended["position_ids"] = torch.cat((positions, behind), dim=-1)
        return extended


def cached_prompt(cache: Any) -> CachedPrompt | None:
    """What is noted on a cache, if it holds anything."""
    if cache is None or not hasattr(cache, "get_seq_length") or cache.get_seq_length() == 0:
        return None
    return getattr(cache, _NOTE, None)


def refuse_new_images(ids: Tensor, cached: CachedPrompt, token_id: int) -> None:
    """Refuse an image or video in a later turn, whose features would have to go behind the cache.

    Raises:
        AttachError: there are placeholders behind the cached prompt.
    """
    n_new = int((ids[:, cached.whole.shape[1] :] == token_id).sum())
    if n_new:
        raise AttachError(
            f"the new turn has an image or video ({n_new} placeholders) and past_key_values is "
            "filled; call generate() without past_key_values for this turn"
        )
