"""Training and test examples from JSON lines, the hub, datasets or lists of dicts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood import optional
from budwood.errors import BudwoodError, InputError, UnknownNameError, first_line
from budwood.hub import hub_or_cache
from budwood.loading import is_file_name

STYLES = ("cloze", "listed")
"""How a question with choices is asked: alone, or with its choices listed below it."""

FORMATS = (
    '{"messages": […]}, {"prompt": …, "completion": …}, {"question": …, "choices": […], '
    '"answer": index}, {"question": …, "answer": text} or {"text": …}'
)
"""The forms that a row can have, for error messages."""

_ROLES = ("system", "user", "assistant", "tool")
_FOR_TEMPLATES = ("tools", "functions", "documents", "chat_template_kwargs")
"""Columns that chat templates can use and that are not passed on."""


@dataclass(frozen=True)
class Example:
    """One conversation or text to train on, or one question to test on.

    Attributes:
        messages: dicts of ``role`` and ``content``. The last is the assistant's, and a user's
            message comes before the first of the assistant's unless ``is_plain``.
        choices: all answers to choose from; empty for free answers.
        answer: index of the right choice; None without choices.
        is_plain: train on the contents as they are, without the chat template.
        n_context: messages at the start that are never supervised, also where they are the
            assistant's.
        where: file and line, or dataset and row, for messages; empty if unknown.
    """

    messages: tuple[dict[str, str], ...]
    choices: tuple[str, ...] = ()
    answer: int | None = None
    is_plain: bool = False
    n_context: int = 0
    where: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """The first message of the user; empty in plain text."""
        return next((m["content"] for m in self.messages if m["role"] == "user"), "")

    @property
    def is_single(self) -> bool:
        """Whether it is one question and its answer, without a system prompt or earlier turns."""
        return len(self.messages) == 2


def examples_of(data: Any, style: str = "cloze") -> list[Example]:
    """Examples from whatever :func:`budwood.tune.finetune` takes as data.

    Args:
        data: a path to JSON lines or a hub id, a list of these, a ``datasets.Dataset``, or a list
            of dicts or of :class:`Example`. Every row has one of ``FORMATS``.
        style: one of ``STYLES``; examples that are read already keep theirs.

    Raises:
        InputError: the data are empty or of another kind, or a row is malformed; the message names
            the row and its keys.
    """
    if style not in STYLES:
        raise UnknownNameError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    if isinstance(data, (str, Path)):
        return read_examples(str(data), style)
    if hasattr(data, "column_names") and isinstance(data, Mapping):  # datasets.DatasetDict
        splits = ", ".join(map(str, data))
        raise InputError(f"data has the splits {splits}; give one of them, such as data['train']")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise InputError(
            f"data is a {type(data).__name__}; give a path, a datasets.Dataset or a list of dicts"
        )
    examples: list[Example] = []
    for i, item in enumerate(data):
        if isinstance(item, Example):
            examples.append(item)
        elif isinstance(item, (str, Path)):
            examples += read_examples(str(item), style)
        else:
            examples.append(_parsed(item, style, f"row {i} of the data"))
    if not examples:
        raise InputError(f"the data are empty; give rows such as {FORMATS}")
    return examples


def read_examples(source: str, style: str = "cloze", split: str = "train") -> list[Example]:
    """Read examples from a file of JSON lines, or from a dataset on the hub.

    Each row has one of ``FORMATS``. The columns of ARC, OpenBookQA and BoolQ on the hub are
    understood as well.

    Args:
        source: a path, or a hub id, with its configuration behind a colon if it has several.
        style: one of ``STYLES``.
        split: split of a dataset on the hub.

    Raises:
        InputError: there is no such file, it is empty, or a line is malformed; the message names
            file and line.
    """
    if style not in STYLES:
        raise UnknownNameError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    rows = _rows_of_file(Path(source)) if is_file_name(source) else _rows_of_hub(source, split)
    examples = [_parsed(row, style, where) for where, row in rows]
    if not examples:
        raise InputError(f"{source} is empty; give lines such as {FORMATS}")
    return examples


def _parsed(row: Any, style: str, where: str) -> Example:
    try:
        return dataclasses.replace(example_of(row, style), where=where)
    except (InputError, TypeError, KeyError) as error:
        raise InputError(f"{where}: {_reason(error)}") from error


def example_of(row: Any, style: str = "cloze") -> Example:
    """Parse one row.

    Raises:
        InputError: the row has none of ``FORMATS``; the message says what is wrong with it.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"is not an object; give {FORMATS}")
    # Datasets fill the columns that a row does not have with None.
    row = {key: value for key, value in row.items() if value is not None}
    if "messages" in row:
        _refuse_filled(row, _FOR_TEMPLATES, "the row")
        return Example(_messages(row["messages"]))
    if "prompt" in row and "completion" in row:
        _refuse_filled(row, _FOR_TEMPLATES, "the row")
        return _completion(row["prompt"], row["completion"])
    question = row.get("question", row.get("question_stem"))
    if question is not None:
        return _question(row, question, style)
    if "text" in row:
        _need_text(row["text"], "text")
        return Example((_said(row["text"]),), is_plain=True)
    raise InputError(f"has the keys {', '.join(map(str, row)) or '(none)'}; give {FORMATS}")


def _completion(prompt: Any, completion: Any) -> Example:
    """A prompt and its completion, both as text or both as messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        _need_text(prompt, "prompt")
        _need_text(completion, "completion")
        return Example(_turns(prompt, completion), is_plain=True)
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages([*prompt, *completion])
        if all(message["role"] != "assistant" for message in messages[len(prompt) :]):
            raise InputError("completion has no assistant's turn, which is trained on")
        return Example(messages, n_context=len(prompt))
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise InputError(f"prompt and completion are {kinds}; give two texts or two lists of messages")


def _question(row: Mapping[str, Any], question: Any, style: str) -> Example:
    _need_text(question, "question")
    choices, answer = _choices(row)
    if not choices:
        _need_text(answer, "answer")
        return Example(_turns(question, answer))
    return styled(Example(_turns(question, choices[answer]), tuple(choices), answer), style)


def styled(example: Example, style: str) -> Example:
    """Put a cloze question into a style; examples without choices stay as they are.

    Args:
        example: an example in the cloze style.
        style: one of ``STYLES``.
    """
    if style == "cloze" or not example.choices:
        return example
    asked = "\n".join([example.question, *(f"- {choice}" for choice in example.choices)])
    return dataclasses.replace(example, messages=_turns(asked, example.messages[-1]["content"]))


def _turns(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": question}, _said(answer)


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list that is not empty")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise InputError(f"a message needs a role, one of {', '.join(_ROLES)}")
        others = [key for key in message if key not in ("role", "content")]
        _refuse_filled(message, others, f"the {message['role']} message")
        _need_text(message.get("content"), f"content of the {message['role']} message")
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles:
        raise InputError("messages need a user's turn and an assistant's, which is trained on")
    if roles[-1] != "assistant":
        raise InputError(f"the last message is the {roles[-1]}'s; it must be the assistant's")
    if roles.index("assistant") < roles.index("user"):
        raise InputError(
            "the assistant speaks before the user; chat templates want a user's turn first, so "
            "leave out the turns before it"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _refuse_filled(row: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    """Refuse what a chat template might use and would not be given; datasets fill up with None."""
    filled = [key for key in keys if row.get(key) not in (None, "", [], {})]
    if filled:
        raise InputError(
            f"{what} has {', '.join(filled)}; only role and content are understood, "
            "so write into the content what the model should see, and leave the rest out"
        )


def _choices(row: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Choices and the index of the right one; no choices and a text for free answers."""
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
        raise InputError(f"answer {answer!r} must be an index from 0 to {len(choices) - 1}")
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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        InputError: the file can't be read, or is not UTF-8 text.
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
    name, _, config = source.partition(":")
    try:
        with hub_or_cache(name, kind="dataset", what="dataset", instead="give a file"):
            datasets = optional.need("datasets", f"{source}, a dataset of the hub,")
            rows = datasets.load_dataset(name, config or None, split=split)
    except BudwoodError:
        raise
    except Exception as error:  # whatever the hub's client raises for what is not there
        raise InputError(
            f"{source} is neither a file nor a dataset to be had: {first_line(error)}"
        ) from error
    return ((f"{source}, row {i}", row) for i, row in enumerate(rows))


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
