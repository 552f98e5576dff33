"""Which text of the prompt counts as the question about an image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from budwood.catalogue import QUESTIONS
from budwood.errors import InputError, UnknownNameError

PUBLISHED = "all"
"""The choice of AdaV's public code."""

_TEMPLATE_WORDS = 3
_INSIDE = -1

QuestionRule: TypeAlias = str | Callable[[Tensor, int, int], Any]
"""``"current"``, ``"turn"``, ``"all"``, or a function ``(ids, start, stop) -> positions``.

The function gets one row of the prompt (int64, on the CPU) and where an image's placeholders are in
it; it returns the positions in that row that are the question, as a list, a tensor or a slice.
"""


@dataclass(frozen=True)
class Scaffold:
    """The chat template's own tokens around what a user says about an image.

    Attributes:
        prefix: between the image and the text.
        suffix: from the end of the text to where the answer begins.
        later: between an answer and the text of the next user turn.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    later: tuple[int, ...] = ()

    @classmethod
    def of(cls, processor: Any, image_token_id: int) -> Scaffold:
        """Read the scaffold off two questions rendered with the processor's chat template.

        What comes out the same for both, token by token in its context, is the template's. Empty if
        there is no template, or it has no place for an image.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        templates = [getattr(one, "chat_template", None) for one in (processor, tokenizer)]
        if not any(templates):
            return cls()
        n_tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        known = (templates, id(tokenizer), n_tokens, image_token_id)
        with contextlib.suppress(TypeError):  # a processor of one's own may have no hash
            before, scaffold = _SCAFFOLDS.get(processor, (None, cls()))
            if before == known:
                return scaffold
        scaffold = cls._rendered_by(processor, tokenizer, image_token_id)
        with contextlib.suppress(TypeError):
            _SCAFFOLDS[processor] = known, scaffold
        return scaffold

    @classmethod
    def _rendered_by(cls, processor: Any, tokenizer: Any, image_token_id: int) -> Scaffold:
        is_it, which = (_rendered(processor, tokenizer, (text,), image_token_id) for text in _TEXTS)
        if is_it is None or which is None:
            return cls()
        prefix, suffix = _same(is_it, which), _same(is_it[::-1], which[::-1])[::-1]
        return cls(tuple(prefix), tuple(suffix), _later(processor, tokenizer, image_token_id))


_SCAFFOLDS: WeakKeyDictionary[Any, tuple[Any, Scaffold]] = WeakKeyDictionary()
"""Rendering takes ten milliseconds; a processor with its templates → its scaffold."""

_TEXTS = ("Is it", "which 7")
"""Two texts whose first and last tokens differ with any tokenizer."""


def _later(processor: Any, tokenizer: Any, image_token_id: int) -> tuple[int, ...]:
    """Tokens between an answer and the next user turn's text; none if that cannot be rendered."""
    before_text = []
    for answer in _TEXTS:
        chats = [("A", answer, text) for text in _TEXTS]
        one, other = (_rendered(processor, tokenizer, chat, image_token_id) for chat in chats)
        if one is None or other is None:
            return ()
        before_text.append(_same(one, other))
    one, other = before_text
    return tuple(_same(one[::-1], other[::-1])[::-1])


def _rendered(
    processor: Any, tokenizer: Any, turns: Sequence[str], image_token_id: int
) -> list[int] | None:
    """Token ids after the image of a chat: user, assistant, user, …; None if it has no image."""
    chat: list[dict[str, Any]] = []
    for number, text in enumerate(turns):
        content = [{"type": "text", "text": text}]
        if number == 0:
            content.insert(0, {"type": "image"})
        chat.append({"role": "assistant" if number % 2 else "user", "content": content})
    try:
        prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
    except Exception:  # templates refuse what they do not know in any way that jinja has
        return None
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

    - ``"current"``: the user's last turn, whichever turn the image is in. The default.
    - ``"turn"``: the text after the image up to the end of its own turn: in a chat of several turns
      the first question about it.
    - ``"all"``: every token after the image, chat template and earlier answers included: the
      published choice.

    ``"current"`` and ``"turn"`` leave out the template's own words if a processor is given. Without
    one, turns end at special tokens. A last piece of at most three tokens then counts as the
    template's, such as ``"assistant"`` and a line break.

    All leave out other images. If several images come before one text they share it; text between
    two images belongs to the first, along with what follows the second. An image with no text after
    it gets the text before it in its turn. In training, supervised tokens are answers and no part
    of the question, unless all the text is supervised. The current turn is then the one before the
    last answer.

    Args:
        rule: a name in ``budwood.catalogue.QUESTIONS``, or a function; see :data:`QuestionRule`.
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
        self.wrapping = frozenset((*wrapping, _INSIDE))
        self.ends = frozenset(ends) - self.wrapping
        self.scaffold = scaffold or Scaffold()

    @classmethod
    def for_model(
        cls, rule: QuestionRule, model: Any, wrapping: Collection[int], processor: Any = None
    ) -> Question:
        """With the special tokens of a model, and of its processor where one is at hand."""
        configs = (model.generation_config, model.config.get_text_config())
        return cls.for_configs(rule, configs, wrapping, processor, model.config.image_token_id)

    @classmethod
    def for_configs(
        cls,
        rule: QuestionRule,
        configs: Sequence[Any],
        wrapping: Collection[int],
        processor: Any,
        image_token_id: int,
    ) -> Question:
        """The same with the configurations alone.

        Args:
            rule: a name in ``budwood.catalogue.QUESTIONS``, or a function.
            configs: for generation and of the language model; None counts as empty.
            wrapping: tokens around and inside images.
            processor: the model's; None if there is none at hand.
            image_token_id: the placeholder of an image.
        """
        ends: set[int] = set()
        for config in configs:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(config, name, None)
                ends.update(value if isinstance(value, list) else [] if value is None else [value])
        if processor is None or rule == "all" or callable(rule):
            return cls(rule, ends, wrapping)
        tokenizer = getattr(processor, "tokenizer", processor)
        ends.update(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        return cls(rule, ends, wrapping, Scaffold.of(processor, image_token_id))

    def positions(
        self,
        ids: Tensor,
        image: tuple[int, int],
        stop: int,
        answers: Collection[int] = (),
        inside: Collection[tuple[int, int]] = (),
    ) -> list[int]:
        """Positions of the question about one image.

        Args:
            ids: one row of the prompt, int64, on the CPU, shape (n_tokens,).
            image: first position of the image's placeholders and the one after the last.
            stop: where the row's padding on the right begins.
            answers: supervised positions.
            inside: where images and videos begin and end that hold more than placeholders, such as
                the timestamps of frames; all of it counts as the image.

        Returns:
            Increasing positions, possibly none.

        Raises:
            InputError: a user's function returned positions outside the row.
        """
        if callable(self.rule):
            return _checked(self.rule(ids, *image), len(ids))
        row = ids.tolist()
        for first, last in inside:
            row[first:last] = [_INSIDE] * (last - first)
        after = self._after(row, image[1], stop)
        if self.rule == "current" and answers:
            after = self._after(row, image[1], _before_last_answer(stop, answers)) or after
        text = [i for i in after if i not in answers] or after
        return text or self._before(row, image[0])

    def _after(self, row: list[int], start: int, stop: int) -> list[int]:
        if self.rule == "all":
            return self._text(row, start, stop)
        if self.rule == "current":
            return self._text(row, *self._current(row, start, stop))
        end = next((i for i in range(start, stop) if row[i] in self.ends), stop)
        end = _find(row, self.scaffold.suffix, start, end)
        return self._without_prefix(row, self._text(row, start, end))

    def _current(self, row: list[int], start: int, stop: int) -> tuple[int, int]:
        """Where the text of the last user turn begins and ends, from an image on."""
        suffix, later = self.scaffold.suffix, self.scaffold.later
        if not suffix or tuple(row[max(stop - len(suffix), start) : stop]) != suffix:
            return self._last_piece(row, start, stop)
        stop -= len(suffix)
        begins = [i for i in range(start, stop) if tuple(row[i : i + len(later)]) == later]
        if later and begins:
            return begins[-1] + len(later), stop
        text = self._without_prefix(row, self._text(row, start, stop))
        return (text[0] if text else stop), stop

    def _last_piece(self, row: list[int], start: int, stop: int) -> tuple[int, int]:
        """The last piece between special tokens that is longer than a template's own words."""
        cuts = [start, *(i + 1 for i in range(start, stop) if row[i] in self.ends), stop + 1]
        pieces = [(left, right - 1) for left, right in pairwise(cuts)]
        longer = [p for p in pieces if len(self._text(row, *p)) > _TEMPLATE_WORDS]
        return (longer or [p for p in pieces if self._text(row, *p)] or [(start, stop)])[-1]

    def _text(self, row: list[int], start: int, stop: int) -> list[int]:
        return [i for i in range(start, stop) if row[i] not in self.wrapping]

    def _without_prefix(self, row: list[int], text: list[int]) -> list[int]:
        prefix = [token for token in self.scaffold.prefix if token not in self.wrapping]
        starts = [row[i] for i in text[: len(prefix)]] == prefix
        return text[len(prefix) :] if starts else text

    def _before(self, row: list[int], image_start: int) -> list[int]:
        start = next((i for i in range(image_start, 0, -1) if row[i - 1] in self.ends), 0)
        return [i for i in range(start, image_start) if row[i] not in self.wrapping]


def _before_last_answer(stop: int, answers: Collection[int]) -> int:
    """Where the last run of supervised tokens begins; ``stop`` if nothing is supervised."""
    begin = max(answers, default=stop)
    while begin - 1 in answers:
        begin -= 1
    return min(begin, stop)


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
    try:
        tensor = torch.as_tensor(found).flatten()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(1)
    if tensor.dtype == torch.bool and len(tensor) == n_tokens:
        tensor = tensor.nonzero().flatten()
    if len(tensor) and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise InputError(
            f"the question function returned {_shortened(found)}; return positions in the row of "
            f"{n_tokens} tokens, a slice, or a mask with an entry for each"
        )
    positions = sorted({int(i) for i in tensor.tolist()})
    if positions and not 0 <= positions[0] <= positions[-1] < n_tokens:
        raise InputError(
            f"the question function returned positions outside the row of {n_tokens} tokens: "
            f"{positions[0]} to {positions[-1]}"
        )
    return positions


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"{text[:60]}…"
