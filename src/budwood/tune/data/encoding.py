"""Examples as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from budwood.errors import InputError, UnsupportedModelError
from budwood.tune.data.examples import Example
from budwood.tune.data.template import (
    end_of_turn,
    n_behind_turn,
    need_calls,
    need_place,
    render,
)
from budwood.tune.data.tokens import Part, n_common, tokens_behind

_WRITTEN = ("user", "tool")
"""Who writes what is asked."""
IGNORED = -100
"""Label of a token that is not supervised."""

EncodedExample = dict[str, list[int]]
"""Lists ``input_ids`` and ``labels``; also ``asked`` where it is known: 1 for the tokens of what
the user wrote, 0 for answers and for what the chat template adds."""


@dataclass(frozen=True)
class Encoded:
    """Examples as tokens.

    Attributes:
        rows: dicts of ``input_ids`` and ``labels``, lists of equal length; label i belongs to token
            i and is ``IGNORED`` but for the assistant's tokens and the end of its turn.
        n_too_long: rows that were left out since they are longer than allowed.
        n_split: chats of which each answer has a row of its own; see :func:`encode_rows`.
    """

    rows: list[EncodedExample]
    n_too_long: int
    n_split: int = 0

    @property
    def note(self) -> str:
        """What to say of chats that were split; empty if there are none."""
        if not self.n_split:
            return ""
        return (
            "the chat template writes earlier turns otherwise when one is added, so each answer of "
            f"{self.n_split} chats is trained by itself, behind the chat that the model sees then"
        )


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, what: str = "examples"
) -> Encoded:
    """Tokenise examples; the loss is on the assistant's turns, or on completions, only.

    The tokens are those of the whole text. Each prompt has the tokens that it has by itself, which
    is what generation sees: a token that would reach from the prompt into the answer is cut there.

    Args:
        examples: what to train on.
        tokenizer: with a chat template, unless all examples are plain text.
        max_length: longer examples are left out.
        what: they are, for messages.

    Raises:
        UnsupportedModelError: there is no chat template, or one that can't be cut into turns.
        InputError: all examples are too long, the chat template refuses one, or one has no
            supervised token.
    """
    has_chats = any(not example.is_plain for example in examples)
    turn_end = turn_end_of(tokenizer) if has_chats else None
    each = [encode_rows(example, tokenizer, turn_end) for example in examples]
    for i, rows in enumerate(each):
        if not all(n_supervised([row]) for row in rows):
            where = examples[i].where or f"row {i} of the data"
            raise InputError(f"{where}: no token is supervised; give an answer with some text")
    encoded = [row for rows in each for row in rows]
    fitting = [row for row in encoded if len(row["input_ids"]) <= max_length]
    if not fitting:
        shortest = min(len(row["input_ids"]) for row in encoded)
        raise InputError(
            f"all {len(encoded)} {what} are longer than max_length={max_length} tokens; "
            f"the shortest has {shortest}"
        )
    return Encoded(fitting, len(encoded) - len(fitting), sum(len(rows) > 1 for rows in each))


def token_rows(data: Iterable[Any], what: str = "the data") -> list[EncodedExample]:
    """Rows of tokens as plain lists of int, whatever arrays they come in.

    Args:
        data: mappings with ``input_ids`` and ``labels``: lists, or arrays of one dimension, such as
            those of a ``datasets.Dataset`` in the format of torch or NumPy.
        what: what the rows are of, for messages.

    Raises:
        InputError: there are no rows, or one has no tokens, other numbers of them and of labels, or
            no supervised token.
    """
    rows = []
    for i, row in enumerate(data):
        where = f"row {i} of {what}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where} is a {type(row).__name__}; give dicts of lists of int")
        ids, labels = (_ints(row.get(key), f"{where}: {key}") for key in ("input_ids", "labels"))
        encoded = {"input_ids": ids, "labels": labels}
        if row.get("asked") is not None:
            encoded["asked"] = _ints(row["asked"], f"{where}: asked")
        if len(ids) != len(labels) or not n_supervised([encoded]):
            raise InputError(
                f"{where} has {len(ids)} input_ids and {len(labels)} labels; give equal numbers, "
                f"and at least one label other than {IGNORED} after the first"
            )
        if min(ids) < 0 or any(label < 0 for label in labels if label != IGNORED):
            raise InputError(f"{where} has a token below 0; labels may be {IGNORED}, no others")
        rows.append(encoded)
    if not rows:
        raise InputError(f"{what} are empty; give rows with input_ids and labels")
    return rows


def _ints(values: Any, what: str) -> list[int]:
    """A list of int, from a list, tensor or array."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise InputError(f"{what} is a {type(values).__name__}; give a list of int")
    plain = [value.item() if hasattr(value, "item") else value for value in values]
    for value in plain:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{what} has {value!r}; give a list of int")
    return plain


def encode_rows(
    example: Example, tokenizer: Any, turn_end: tuple[str, int] | None = None
) -> list[EncodedExample]:
    """One example as ``input_ids`` and ``labels``.

    Some templates write earlier turns otherwise when one is added: Qwen3 drops the thoughts, and
    Phi-3 the end of the text. Then each answer of a chat has a row of its own, behind what the
    model sees before it. In all other cases there is one row.

    Args:
        example: what to train on.
        tokenizer: as of :func:`encode`, with its errors.
        turn_end: of :func:`turn_end_of`, where it is known.
    """
    if example.is_plain:
        return [_plain(example, tokenizer)]
    try:
        return [_chat(example, tokenizer, turn_end)]
    except _EarlierTurnsError:
        parts = [
            replace(example, messages=example.messages[: i + 1], n_context=i)
            for i in _answers(example)
        ]
        return [_chat(part, tokenizer, turn_end) for part in parts]


class _EarlierTurnsError(Exception):
    """The chat template writes earlier turns otherwise when one is added."""


def _answers(example: Example) -> list[int]:
    """Which messages are supervised."""
    return [
        i
        for i, message in enumerate(example.messages)
        if message["role"] == "assistant" and i >= example.n_context
    ]


def turn_end_of(tokenizer: Any) -> tuple[str, int]:
    """What a template writes behind a reply, and its tokens behind the one that ends the turn."""
    end = end_of_turn(tokenizer)
    return end, n_behind_turn(tokenizer, end)


def _plain(example: Example, tokenizer: Any) -> EncodedExample:
    """A prompt and its completion, or a text, as they are, with the end of the text."""
    *before, last = (message["content"] for message in example.messages)
    asked = "".join(before)
    prompt = tokenizer(asked, add_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id
    if prompt and prompt[-1] == end and end != tokenizer.bos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text
    completion = tokens_behind(tokenizer, asked, last)
    if end is not None and completion[-1:] != [end]:
        completion = [*completion, end]
    return {
        "input_ids": prompt + completion,
        "labels": [IGNORED] * len(prompt) + completion,
        "asked": [int(token != tokenizer.bos_token_id) for token in prompt] + [0] * len(completion),
    }


def _chat(example: Example, tokenizer: Any, turn_end: tuple[str, int] | None) -> EncodedExample:
    """A conversation through the chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedModelError(
            "the tokenizer has no chat template; use an instruct model, or give prompts and "
            "completions as text"
        )
    end, n_behind = turn_end or turn_end_of(tokenizer)
    messages = list(example.messages)
    input_ids: list[int] = []
    labels: list[int] = []
    written: list[int] = []
    done, first = "", 0
    for i in _answers(example):
        prompt = render(tokenizer, messages[:i], True, example.where, example.tools)
        whole = render(tokenizer, messages[: i + 1], False, example.where, example.tools)
        if not prompt.startswith(done):
            raise _EarlierTurnsError
        if not whole.startswith(prompt):
            raise UnsupportedModelError(_no_beginning(prompt, whole, example.where))
        need_calls(messages[i], whole[len(prompt) :], example.where)
        asked = Part(tokenizer, done, prompt[len(done) :])
        turn = tokens_behind(tokenizer, prompt, whole[len(prompt) :])
        n_said = len(turn) - (n_behind if whole.endswith(end) else 0)
        said, tail = turn[:n_said], turn[n_said:]
        input_ids += asked.tokens + said + tail
        labels += [IGNORED] * len(asked.tokens) + said + [IGNORED] * len(tail)
        by_user = [one["content"] for one in messages[first:i] if one["role"] in _WRITTEN]
        written += asked.places_of(by_user) + [0] * len(said + tail)
        done, first = whole, i + 1
    need_place(tokenizer, example, done)
    n_used = max((i for i, label in enumerate(labels) if label != IGNORED), default=-1) + 1
    return {
        "input_ids": input_ids[:n_used],
        "labels": labels[:n_used],
        "asked": written[:n_used],
    }


def _no_beginning(prompt: str, whole: str, where: str) -> str:
    """Why the beginning of a reply cannot be found in the finished turn."""
    added = prompt[n_common(prompt, whole) :]
    return (
        f"{where + ': ' if where else ''}the model's chat template begins a reply with {added!r}, "
        "which it leaves out of the finished turn, so training would not fit generation; give "
        "`prompt` and `completion` as the model sees them, or the tokenizer another chat template"
    )


def told_labels(row: EncodedExample) -> list[int]:
    """Labels that tell SLIM of the tokens that the user wrote as well: the next one has a label."""
    labels = list(row["labels"])
    for i, asked in enumerate(row.get("asked", ())[: len(labels) - 1]):
        if asked:
            labels[i + 1] = row["input_ids"][i + 1]
    return labels


def n_supervised(rows: Sequence[EncodedExample]) -> int:
    """Supervised tokens in one pass over some examples."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def longest_for(model: Any, max_length: int) -> int:
    """The longest example: ``max_length``, but not more than the model has positions.

    Args:
        model: a transformers model, or a PEFT model around one.
        max_length: the requested length, in tokens.
    """
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, n_positions or max_length)
