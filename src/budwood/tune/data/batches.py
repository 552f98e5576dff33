"""Batches of encoded examples, padded as a model needs it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.tune.data.encoding import IGNORED, EncodedExample
from budwood.unwrap import innermost


@dataclass(frozen=True)
class Padded:
    """Collates examples into a batch, padded on the left.

    All answers then end at the last position, and the logits before them need not be computed,
    which with a large vocabulary saves as much as many layers cost. Models with a running state,
    some of which read padding, get it on the right instead.

    Args:
        pad_id: the padding token.
        multiple: lengths are padded to a multiple of this.
        trim: add ``logits_to_keep``, and give labels for those positions only.
        n_before: further positions to keep before the first label.
        count: add ``position_ids``, counted from the beginning of each row.
        behind: pad on the right; excludes ``trim``.
    """

    pad_id: int
    multiple: int = 8
    trim: bool = True
    n_before: int = 0
    count: bool = False
    behind: bool = False

    @classmethod
    def of(cls, model: Any, tokenizer: Any, **options: Any) -> Padded:
        """The collator for a model; further options as of the class."""
        if is_stateful(model):
            return cls(pad_of(tokenizer), **options | {"trim": False, "behind": True})
        options = {"trim": takes(model, "logits_to_keep"), "count": _counts(model)} | options
        return cls(pad_of(tokenizer), **options)

    def __call__(self, rows: Sequence[EncodedExample]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        width = -(-width // self.multiple) * self.multiple
        batch: dict[str, Any] = {
            "input_ids": self._padded([row["input_ids"] for row in rows], width, self.pad_id),
            "attention_mask": self._padded([[1] * len(row["labels"]) for row in rows], width, 0),
        }
        if self.count:
            batch["position_ids"] = positions(batch["attention_mask"])
        labels = self._padded([row["labels"] for row in rows], width, IGNORED)
        if self.trim:
            n_kept = min(_n_last(rows) + 1 + self.n_before, width)
            batch["logits_to_keep"] = n_kept
            labels = labels[:, -n_kept:]
        return batch | {"labels": labels}

    def _padded(self, rows: Sequence[list[int]], width: int, fill: int) -> Tensor:
        gaps = [[fill] * (width - len(row)) for row in rows]
        return torch.tensor([r + g if self.behind else g + r for r, g in zip(rows, gaps)])


def pad_of(tokenizer: Any) -> int:
    """The padding token, or the end of a turn if the tokenizer has none."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def on_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """A batch with its tensors on a device; other values stay as they are."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def positions(mask: Tensor) -> Tensor:
    """The place of each token in its row, from 0, by an attention mask of shape (n, length)."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _counts(model: Any) -> bool:
    """Whether padding on the left shifts positions for a model; rotary positions are relative."""
    text = model.config.get_text_config()
    return takes(model, "position_ids") and not getattr(text, "rope_parameters", None)


def takes(model: Any, name: str) -> bool:
    """Whether a model, or the one inside an adapter, has an argument of that name."""
    return name in inspect.signature(innermost(model).forward).parameters


def is_stateful(model: Any) -> bool:
    """Whether a model, or the one inside an adapter, has layers with a state and no cache."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    others = set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"}
    return bool(others) or bool(getattr(innermost(model), "_is_stateful", False))


def _n_last(rows: Sequence[EncodedExample]) -> int:
    """Tokens from the first label of a row to its end; the most of any row."""
    first = [next(i for i, x in enumerate(row["labels"]) if x != IGNORED) for row in rows]
    return max(len(row["labels"]) - i for row, i in zip(rows, first))
