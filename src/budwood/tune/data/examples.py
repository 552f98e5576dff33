"""Training and test examples from files, the hub, datasets or lists of dicts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood import optional
from budwood.errors import InputError, UnknownNameError
from budwood.tune.data.other_formats import (
    BELOW_THE_QUESTION,
    asked_of,
    calls_of,
    canonical,
    has_numbers,
    index_of,
    plain,
    system_of,
    tools_of,
)
from budwood.tune.data.sources import rows_of

STYLES = ("cloze", "listed")
"""How a question with choices is asked: alone, or with its choices listed below it."""

FORMATS = (
    '{"messages": […]}, {"conversations": […]}, {"prompt": …, "completion": …}, '
    '{"instruction": …, "output": …}, {"question": …, "choices": […], "answer": index or letter}, '
    '{"question": …, "answer": text} or {"text": …}'
)
"""The forms that a row can have, for error messages."""

_ROLES = ("system", "user", "assistant", "tool")
_ASKED = ("question", "question_stem")
_ANSWERS_OF_TEXT = (
    *("label", "labels", "label_text", "summary", "target", "answer"),
    *("prompt", "completion", "output", "response"),
)
"""Columns that make a text the input of a task, as in data for classification and summaries."""
_FOR_TEMPLATES = ("functions", "documents", "chat_template_kwargs")
"""Columns that chat templates can use and that are not passed on."""
_OF_MESSAGES = {
    "assistant": ("tool_calls", "reasoning_content", "thinking"),
    "tool": ("name", "tool_call_id"),
}
"""Role → keys of its messages, beside role and content, that chat templates are given."""


@dataclass(frozen=True)
class Example:
    """One conversation or text to train on, or one question to test on.

    Attributes:
        messages: dicts of ``role`` and ``content``, the assistant's also of ``tool_calls`` or
            its thoughts. The last is the assistant's, and a user's message comes before the first
            of the assistant's unless ``is_plain``.
        tools: schemas of the tools that the assistant may call.
        choices: all answers to choose from; empty for free answers.
        answer: index of the right choice; None without choices.
        is_plain: train on the contents as they are, without the chat template.
        n_context: messages at the start that are never supervised, also where they are the
            assistant's.
        where: file and line, or dataset and row, for messages; empty if unknown.
    """

    messages: tuple[dict[str, Any], ...]
    choices: tuple[str, ...] = ()
    answer: int | None = None
    is_plain: bool = False
    n_context: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    where: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """The first message of the user; empty in plain text."""
        return next((m["content"] for m in self.messages if m["role"] == "user"), "")

    @property
    def is_single(self) -> bool:
        """Whether it is one question and its answer: no system prompt, earlier turns or tools."""
        return len(self.messages) == 2 and not self.tools and not self.has_more_than_content

    @property
    def has_more_than_content(self) -> bool:
        """Whether the answer has thoughts or calls of tools."""
        return len(self.messages[-1]) > 2


def examples_of(data: Any, style: str = "cloze") -> list[Example]:
    """Examples from whatever :func:`budwood.tune.finetune` takes as data.

    Args:
        data: a path to JSON, CSV or Parquet, a hub id, a ``datasets.Dataset`` in any format, a
            list of these, a DataFrame of pandas, or a list of dicts or of :class:`Example`. Every
            row has one of ``FORMATS``.
        style: one of ``STYLES``; examples that are read already keep theirs.

    Raises:
        InputError: the data are empty or of another kind, or a row is malformed; the message names
            the row and its keys.
    """
    check_style(style)
    if isinstance(data, (str, Path)):
        return read_examples(str(data), style)
    if hasattr(data, "to_records"):  # a table of pandas
        data = optional.need("datasets", "a DataFrame").Dataset.from_pandas(
            data, preserve_index=False
        )
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
        elif isinstance(item, (str, Path)) or hasattr(item, "column_names"):
            examples += examples_of(item, style)
        else:
            examples.append(_parsed(item, style, f"row {i} of the data"))
    if not examples:
        raise InputError(f"the data are empty; give rows such as {FORMATS}")
    return examples


def read_examples(source: str, style: str = "cloze", split: str = "train") -> list[Example]:
    """Read examples from a file, or from a dataset on the hub.

    A file has JSON lines, one JSON array, or a table (``.csv``, ``.tsv``, ``.parquet``). Each row
    has one of ``FORMATS``. The columns of ARC, OpenBookQA and BoolQ on the hub are understood as
    well.

    Args:
        source: a path, or a hub id, with its configuration behind a colon if it has several.
        style: one of ``STYLES``.
        split: split of a dataset on the hub.

    Raises:
        InputError: there is no such file, it is empty, or a line is malformed; the message names
            file and line.
    """
    check_style(style)
    examples = [_parsed(row, style, where) for where, row in rows_of(source, split)]
    if not examples:
        raise _empty(source)
    return examples


def check_first_row(source: str, style: str = "cloze") -> None:
    """Refuse a file by its first row. This imports nothing heavy, and reads no further in JSON.

    Args:
        source: what :func:`read_examples` takes, or the name of a task; only files are looked at.
        style: one of ``STYLES``.

    Raises:
        InputError: the file can't be read, or is empty, or its first row is malformed.
        UnknownNameError: there is no such style.
    """
    check_style(style)
    if not Path(source).expanduser().is_file():
        return
    first = next(iter(rows_of(source)), None)
    if first is None:
        raise _empty(source)
    where, row = first
    _parsed(row, style, where)


def check_style(style: str) -> None:
    """Refuse a style that is not one of ``STYLES``."""
    if style not in STYLES:
        raise UnknownNameError(f"unknown style {style!r}; known: {', '.join(STYLES)}")


def _empty(source: str) -> InputError:
    return InputError(f"{source} is empty; give rows such as {FORMATS}")


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
    row = canonical({key: plain(value) for key, value in row.items() if value is not None})
    tools = tools_of(row["tools"]) if row.get("tools") else ()
    if "messages" in row:
        _refuse_filled(row, _FOR_TEMPLATES, "the row")
        return Example(_with_system(row, _messages(row["messages"])), tools=tools)
    if "prompt" in row and "completion" in row:
        _refuse_filled(row, (*_FOR_TEMPLATES, *BELOW_THE_QUESTION, "system"), "the row")
        return _completion(row["prompt"], row["completion"], tools)
    for asked in _ASKED:
        if asked in row:
            _need_text(row[asked], asked)
            return _question(row, asked_of(row, asked), style)
    if "text" in row:
        _need_text(row["text"], "text")
        _refuse_answers_of_text(row)
        return Example((_said(row["text"]),), is_plain=True)
    raise InputError(f"has the keys {', '.join(map(str, row)) or '(none)'}; give {FORMATS}")


def _completion(prompt: Any, completion: Any, tools: tuple[dict[str, Any], ...]) -> Example:
    """A prompt and its completion, both as text or both as messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        if tools:
            raise InputError("tools need messages, and prompt and completion are texts")
        _need_text(prompt, "prompt")
        _need_text(completion, "completion")
        return Example(_turns(prompt, completion), is_plain=True)
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages([*prompt, *completion])
        if all(message["role"] != "assistant" for message in messages[len(prompt) :]):
            raise InputError("completion has no assistant's turn, which is trained on")
        return Example(messages, n_context=len(prompt), tools=tools)
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise InputError(f"prompt and completion are {kinds}; give two texts or two lists of messages")


def _with_system(
    row: Mapping[str, Any], messages: tuple[dict[str, Any], ...]
) -> tuple[dict[str, Any], ...]:
    """Messages behind the system's, where the row has that in a column of its own."""
    own = system_of(row)
    if own and messages[0]["role"] == "system":
        raise InputError("has a system beside a system message; leave one of them out")
    return (*map(_message, own), *messages)


def _question(row: Mapping[str, Any], question: str, style: str) -> Example:
    choices, answer = _choices(row)
    if not choices:
        _need_text(answer, "answer")
        return Example(_with_system(row, _turns(question, answer)))
    _refuse_filled(row, ("system",), "a question with choices")
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


def _messages(messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list that is not empty")
    read = [_message(message) for message in messages]
    roles = [message["role"] for message in read]
    if "user" not in roles or "assistant" not in roles:
        raise InputError("messages need a user's turn and an assistant's, which is trained on")
    if roles[-1] != "assistant":
        raise InputError(f"the last message is the {roles[-1]}'s; it must be the assistant's")
    if roles.index("assistant") < roles.index("user"):
        raise InputError(
            "the assistant speaks before the user; chat templates want a user's turn first, so "
            "leave out the turns before it"
        )
    return tuple(read)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        raise InputError(f"a message needs a role, one of {', '.join(_ROLES)}")
    role, content = message["role"], message.get("content")
    known = _OF_MESSAGES.get(role, ())
    others = [key for key in message if key not in ("role", "content", *known)]
    _refuse_filled(message, others, f"the {role} message")
    more = {key: message[key] for key in known if message.get(key)}
    if "tool_calls" in more:
        more["tool_calls"] = calls_of(more["tool_calls"])
    if not (content in (None, "") and "tool_calls" in more):
        _need_text(content, f"content of the {role} message")
    return {"role": role, "content": content or "", **more}


def _refuse_filled(row: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    """Refuse what a chat template might use and would not be given; datasets fill up with None."""
    filled = [key for key in keys if row.get(key) not in (None, "", [], {})]
    if filled:
        raise InputError(
            f"{what} has {', '.join(filled)}, which is not understood, so write into the content "
            "what the model should see, and leave the rest out"
        )


def _refuse_answers_of_text(row: Mapping[str, Any]) -> None:
    """Refuse a text with something else to learn: only the text would be."""
    beside = [key for key in _ANSWERS_OF_TEXT if row.get(key) not in (None, "", [], {})]
    if beside:
        raise InputError(
            f"is a text beside {', '.join(beside)}, and only the text would be learnt; give prompt "
            "and completion, or question and answer, or leave out all columns but text"
        )


def _choices(row: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Choices and the index of the right one; no choices and a text for free answers."""
    choices, answer = row.get("choices"), row.get("answer", row.get("answerKey"))
    if answer is None:
        raise InputError(_without_answer(row))
    labels = None
    if choices is None and isinstance(answer, bool):
        return ["false", "true"], int(answer)
    if choices is None:
        return [], answer
    if isinstance(choices, Mapping):  # ARC and OpenBookQA: {"text": [...], "label": [...]}
        labels, choices = list(choices["label"]), list(choices["text"])
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError("choices must be a list of two or more")
    for choice in choices:
        _need_text(choice, "a choice")
    index = index_of(answer, choices, labels)
    if index is None:
        index = "" if has_numbers(labels) else f"an index from 0 to {len(choices) - 1}, "
        named = f"one of the labels {', '.join(map(str, labels))}" if labels else "the letter"
        raise InputError(f"answer {answer!r} must be {index}{named}, or the text of a choice")
    return choices, choices.index(choices[index])  # the first of two that are the same


def _without_answer(row: Mapping[str, Any]) -> str:
    """What to say of a question whose answer is missing, or called something else."""
    near = [name for name in map(str, row) if "answer" in name.lower()]
    near = near or difflib.get_close_matches("answer", map(str, row), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"has no answer, or an empty one; the columns with values are {', '.join(map(str, row))}; "
        f"{hint}give it in a column called answer"
    )


def _need_text(value: Any, what: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} must be a text that is not empty, and is {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has half a character, a lone surrogate, at {error.start}; write it whole"
        ) from None


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
