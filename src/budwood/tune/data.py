"""Training and test examples from JSON lines or the hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.errors import InputError, UnknownNameError, first_line

STYLES = ("cloze", "listed")
"""How a question with choices is asked: by itself, or with its choices listed below it."""

_ROLES = ("system", "user", "assistant", "tool")
_BESIDE_MESSAGES = ("tools", "functions", "documents")
_FORMS = 'give "messages", or "question", "choices" and "answer"'


@dataclass(frozen=True)
class Example:
    """One conversation to learn from, or one question to be tested on.

    Attributes:
        messages: dicts of ``role`` and ``content``; the last is the assistant's, and a user's comes
            before the first of the assistant's.
        choices: all answers that there were to choose from; empty where any text will do.
        answer: index of the right choice, None without choices.
        where: file and line, or dataset and row, for messages; empty if unknown.
    """

    messages: tuple[dict[str, str], ...]
    choices: tuple[str, ...] = ()
    answer: int | None = None
    where: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """What the user asks first."""
        return next(m["content"] for m in self.messages if m["role"] == "user")

    @property
    def is_single(self) -> bool:
        """Whether it is one question and its answer, without a system prompt or earlier turns."""
        return len(self.messages) == 2


def read_examples(source: str, style: str = "cloze", split: str = "train") -> list[Example]:
    """Read examples from a file of JSON lines, or from a dataset on the hub.

    A line is ``{"messages": [{"role": …, "content": …}, …]}``, or ``{"question": …, "choices":
    […], "answer": index}``, or ``{"question": …, "answer": text}``. The columns of ARC, OpenBookQA
    and BoolQ on the hub are understood as well.

    Args:
        source: a path, or a hub id, with its configuration behind a colon if it has several.
        style: one of ``STYLES``.
        split: of a dataset on the hub.

    Raises:
        InputError: there is no such file, it is empty, or a line is malformed; the message names
            file and line.
    """
    if style not in STYLES:
        raise UnknownNameError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    rows = _rows_of_file(Path(source)) if is_file(source) else _rows_of_hub(source, split)
    examples = []
    for where, row in rows:
        try:
            examples.append(dataclasses.replace(example_of(row, style), where=where))
        except (InputError, TypeError, KeyError) as error:
            raise InputError(f"{where}: {_reason(error)}") from error
    if not examples:
        raise InputError(f"{source} is empty; {_FORMS} on each line")
    return examples


def example_of(row: Any, style: str = "cloze") -> Example:
    """An example from one row.

    Raises:
        InputError: the row has another form; the message says what is wrong with it.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"is not an object; {_FORMS}")
    if "messages" in row:
        _refuse_filled(row, _BESIDE_MESSAGES, "the line")
        return Example(_messages(row["messages"]))
    question = row.get("question", row.get("question_stem"))
    if question is None:
        raise InputError(f"has neither messages nor a question; {_FORMS}")
    _need_text(question, "question")
    choices, answer = _choices(row)
    if not choices:
        _need_text(answer, "answer")
        return Example(_turns(question, answer))
    return styled(Example(_turns(question, choices[answer]), tuple(choices), answer), style)


def styled(example: Example, style: str) -> Example:
    """A cloze question in a style; examples without choices have only one.

    Args:
        example: as it is read.
        style: one of ``STYLES``.
    """
    if style == "cloze" or not example.choices:
        return example
    asked = "\n".join([example.question, *(f"- {choice}" for choice in example.choices)])
    return dataclasses.replace(example, messages=_turns(asked, example.messages[-1]["content"]))


def _turns(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _messages(found: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(found, list) or not found:
        raise InputError("messages must be a list that is not empty")
    for message in found:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise InputError(f"a message needs a role, one of {', '.join(_ROLES)}")
        others = [key for key in message if key not in ("role", "content")]
        _refuse_filled(message, others, f"the {message['role']} message")
        _need_text(message.get("content"), f"content of the {message['role']} message")
    roles = [message["role"] for message in found]
    if "user" not in roles or "assistant" not in roles:
        raise InputError("messages need a user's turn and an assistant's, which is what is learnt")
    if roles[-1] != "assistant":
        raise InputError(f"the last message is the {roles[-1]}'s; it must be the assistant's")
    if roles.index("assistant") < roles.index("user"):
        raise InputError(
            "the assistant speaks before the user; chat templates want a user's turn first, so "
            "leave the turns before it out"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in found)


def _refuse_filled(row: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    """Refuse what a chat template might use and would not be given; datasets fill up with None."""
    filled = [key for key in keys if row.get(key) not in (None, "", [])]
    if filled:
        raise InputError(
            f"{what} has {', '.join(filled)}; only role and content are understood, "
            "so write into the content what is to be learnt, and leave the rest out"
        )


def _choices(row: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Choices and the index of the right one; no choices and a text where there are none."""
    choices, answer = row.get("choices"), row.get("answer", row.get("answerKey"))
    if choices is None and isinstance(answer, bool):
        return ["false", "true"], int(answer)
    if choices is None:
        return [], answer
    if isinstance(choices, Mapping):  # ARC and OpenBookQA: {"text": [...], "label": [...]}
        labels, choices = list(choices["label"]), list(choices["text"])
        answer = labels.index(answer) if answer in labels else answer
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError("choices must be a list of two or more")
    for choice in choices:
        _need_text(choice, "a choice")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(f"answer {answer!r} is no index of {len(choices)} choices, from 0")
    return choices, answer


def _need_text(value: Any, what: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} must be a text that is not empty, and is {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has half a character, a lone surrogate, at {error.start}; write it whole"
        ) from None


def is_file(source: str) -> bool:
    """Whether a source is a file, there or missing, and not the name of a dataset or task."""
    path = Path(source)
    looks = path.suffix in (".jsonl", ".json", ".txt") or source.startswith((".", "/", "~"))
    return path.is_file() or looks


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        InputError: the file can't be read, or is no UTF-8 text.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from error


def _rows_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: is not JSON ({error})") from error


def _rows_of_hub(source: str, split: str) -> Iterable[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"there is no file {source}, and datasets of the hub need: pip install 'budwood[tune]'"
        ) from error
    name, _, config = source.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever the hub's client raises for what is not there
        raise InputError(
            f"{source} is neither a file nor a dataset to be had: {first_line(error)}"
        ) from error
    return ((f"{source}, row {i}", row) for i, row in enumerate(rows))


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
