"""Which text of the prompt counts as the question about an image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from budwood.errors import InputError, UnknownNameError

QUESTIONS = ("all", "turn")

QuestionRule: TypeAlias = str | Callable[[Tensor, int, int], Any]
"""``"all"``, ``"turn"``, or a function ``(ids, start, stop) -> positions``.

The function gets one row of the prompt (int64, on the CPU) and where an image's placeholders are in
it; it returns the positions in that row that are the question, as a list, a tensor or a slice.
"""


@dataclass(frozen=True)
class Scaffold:
    """The chat template's own tokens around what a user says about an image.

    Attributes:
        prefix: between the image and the text.
        suffix: from the end of the text to where the answer begins.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @classmethod
    def of(cls, processor: Any, image_token_id: int) -> Scaffold:
        """Read the scaffold off two questions rendered with the processor's chat template.

        What comes out the same for both, token by token in its context, is the template's. Empty if
        there is no template, or it has no place for an image.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        if not (
            getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        ):
            return cls()
        after = [
            _rendered(processor, tokenizer, text, image_token_id) for text in ("Is it", "which 7")
        ]
        if None in after:
            return cls()
        one, other = (ids for ids in after if ids is not None)
        return cls(tuple(_same(one, other)), tuple(_same(one[::-1], other[::-1])[::-1]))


def _rendered(processor: Any, tokenizer: Any, text: str, image_token_id: int) -> list[int] | None:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if image_token_id not in ids:
        return None
    return ids[len(ids) - ids[::-1].index(image_token_id) :]


def _same(one: Sequence[int], other: Sequence[int]) -> list[int]:
    common = []
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        common.append(left)
    return common


class Question:
    """Finds the question about an image in a row of token ids.

    - ``"all"``: every token after the image, chat scaffolding included: the published choice.
    - ``"turn"``: the text after the image up to the end of the user's turn, which is the first
      special token (or the template's suffix, if a processor is given); the template's prefix
      between image and text is left out too.

    Both leave out other images. If several images come before one text they share it; text between
    two images belongs to the first, along with what follows the second. An image with no text after
    it gets the text before it in its turn. In training, supervised tokens are answers and no part
    of the question, unless all the text is supervised.

    Args:
        rule: ``"all"``, ``"turn"`` or a function; see :data:`QuestionRule`.
        ends: special tokens, each of which ends a turn.
        wrapping: tokens around and inside images, which neither are text nor end a turn.
        scaffold: the chat template's tokens.

    Raises:
        UnknownNameError: ``rule`` is another name.
    """

    def __init__(
        self,
        rule: QuestionRule,
        ends: Collection[int] = (),
        wrapping: Collection[int] = (),
        scaffold: Scaffold | None = None,
    ) -> None:
        if not callable(rule) and rule not in QUESTIONS:
            raise UnknownNameError(
                f"unknown question {rule!r}; give {' or '.join(map(repr, QUESTIONS))}, or a "
                "function (ids, start, stop) -> positions"
            )
        self.rule = rule
        self.wrapping = frozenset(wrapping)
        self.ends = frozenset(ends) - self.wrapping
        self.scaffold = scaffold or Scaffold()

    @classmethod
    def for_model(
        cls, rule: QuestionRule, model: Any, wrapping: Collection[int], processor: Any = None
    ) -> Question:
        """With the special tokens of a model, and of its processor where one is at hand."""
        ends: set[int] = set()
        for config in (model.generation_config, model.config.get_text_config()):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(config, name, None)
                ends.update(value if isinstance(value, list) else [] if value is None else [value])
        if processor is None or rule != "turn":
            return cls(rule, ends, wrapping)
        tokenizer = getattr(processor, "tokenizer", processor)
        ends.update(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        return cls(rule, ends, wrapping, Scaffold.of(processor, model.config.image_token_id))

    def positions(
        self, ids: Tensor, image: tuple[int, int], stop: int, answers: Collection[int] = ()
    ) -> list[int]:
        """Positions of the question about one image.

        Args:
            ids: one row of the prompt, int64, on the CPU, shape (n_tokens,).
            image: first position of the image's placeholders and the one after the last.
            stop: where the row's padding on the right begins.
            answers: supervised positions.

        Returns:
            Increasing positions, possibly none.

        Raises:
            InputError: a user's function returned positions outside the row.
        """
        if callable(self.rule):
            return _checked(self.rule(ids, *image), len(ids))
        row = ids.tolist()
        after = self._after(row, image[1], stop)
        text = [i for i in after if i not in answers] or after
        return text or self._before(row, image[0])

    def _after(self, row: list[int], start: int, stop: int) -> list[int]:
        if self.rule == "all":
            return [i for i in range(start, stop) if row[i] not in self.wrapping]
        end = next((i for i in range(start, stop) if row[i] in self.ends), stop)
        end = _find(row, self.scaffold.suffix, start, end)
        text = [i for i in range(start, end) if row[i] not in self.wrapping]
        prefix = [token for token in self.scaffold.prefix if token not in self.wrapping]
        if [row[i] for i in text[: len(prefix)]] == prefix:
            text = text[len(prefix) :]
        return text

    def _before(self, row: list[int], image_start: int) -> list[int]:
        start = next((i for i in range(image_start, 0, -1) if row[i - 1] in self.ends), 0)
        return [i for i in range(start, image_start) if row[i] not in self.wrapping]


def _find(row: list[int], pattern: tuple[int, ...], start: int, end: int) -> int:
    """Where ``pattern`` first begins within [start, end); ``end`` if nowhere."""
    if pattern:
        for i in range(start, end):
            if row[i] == pattern[0] and tuple(row[i : i + len(pattern)]) == pattern:
                return i
    return end


def _checked(found: Any, n_tokens: int) -> list[int]:
    if isinstance(found, slice):
        return list(range(*found.indices(n_tokens)))
    positions = torch.as_tensor(found, dtype=torch.long).flatten().tolist()
    if any(not 0 <= i < n_tokens for i in positions):
        raise InputError(
            f"the question function returned positions outside the row of {n_tokens} tokens: "
            f"{min(positions)} to {max(positions)}"
        )
    return positions
