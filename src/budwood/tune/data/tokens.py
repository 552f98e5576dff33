"""Texts as tokens, and parts of texts as tokens behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

_APART = "\n"
"""A text that most tokenizers join with nothing behind it."""


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text by itself, without those that a tokenizer adds around texts."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokens_behind(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of a text that stands behind another; see :class:`Part`."""
    return Part(tokenizer, before, text).tokens


def n_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens, or characters, two rows have in common at their beginnings."""
    differ = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(differ, min(len(first), len(second)))


class Part:
    """A text that stands behind another, as tokens.

    Both are tokenised together. SentencePiece puts a space in front of each text that it is given,
    so the text by itself would begin with a space that is not there.

    A token may reach from ``before`` into the text, such as that of two line breaks. The texts are
    cut apart there: ``before`` keeps the tokens that it has by itself, which is what generation
    sees, and the text gets its own.

    Args:
        tokenizer: of any kind.
        before: what stands before the text; empty for nothing.
        text: may be empty.

    Attributes:
        tokens: of the text alone.
    """

    def __init__(self, tokenizer: Any, before: str, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        for start in (before, _APART):
            first, both = (text_tokens(tokenizer, one) for one in (start, start + text))
            if both[: len(first)] == first:
                self.tokens, self._before = both[len(first) :], start
                return
        self.tokens, self._before = text_tokens(tokenizer, text), ""

    def n_up_to(self, place: int) -> int:
        """How many of the tokens end at a place of the text, or before it.

        Args:
            place: number of characters.
        """
        if self._ends is not None:
            return sum(end <= place for end in self._ends)
        start = tokens_behind(self._tokenizer, self._before, self._text[:place])
        return n_common(start, self.tokens)

    def places_of(self, parts: Sequence[str]) -> list[int]:
        """Which tokens are those of some parts of the text: 1 or 0 for each.

        A token that reaches into a part is one of its tokens, and one that reaches out of it is
        not.

        Args:
            parts: in the order of the text; those that are not in it are left out.
        """
        places = [0] * len(self.tokens)
        end = 0
        for part in parts:
            begin = self._text.find(part.strip(), end)
            if begin < 0:  # the template rewrites it
                continue
            end = begin + len(part.strip())
            first, last = self.n_up_to(begin), self.n_up_to(end)
            places[first:last] = [1] * (last - first)
        return places

    @cached_property
    def _ends(self) -> list[int] | None:
        """Where in the text each token ends; None if the tokenizer does not say."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        text = self._before + self._text
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end - len(self._before) for _, end in found["offset_mapping"]]
        return ends[len(ends) - len(self.tokens) :]
