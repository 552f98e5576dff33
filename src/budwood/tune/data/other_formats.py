"""Forms of rows that are in use elsewhere, turned into those of ``examples``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from budwood.errors import InputError

_ASKED_AND_ANSWERED = (
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("query", "response"),  # MetaMathQA
    ("question", "response"),
    ("prompt", "response"),
)
"""Columns of single questions and their answers."""

BELOW_THE_QUESTION = ("input", "context")
"""Columns that continue the question: Alpaca's and Dolly's."""

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Who speaks in ShareGPT's conversations."""

_PREFERENCES = ("chosen", "rejected")


def canonical(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row in one of the forms that ``examples`` reads; others come back as they are.

    Understood are ShareGPT's ``conversations`` with ``from`` and ``value``, also under
    ``messages``; single questions and answers such as Alpaca's ``instruction``, ``input`` and
    ``output``; and choices in columns of their own, ``A``, ``B``, ….

    Args:
        row: without entries that are None.

    Raises:
        InputError: a preference, or a history beside a question.
    """
    if all(key in row for key in _PREFERENCES):
        raise InputError(
            "is a preference, chosen and rejected; train on it with TRL's DPOTrainer and SlimConfig"
        )
    talk = row.get("messages", row.get("conversations"))
    if isinstance(talk, list):
        return {**row, "messages": [_message(turn) for turn in talk]}
    for asked, answered in _ASKED_AND_ANSWERED:
        if asked in row and answered in row:
            return _single(row, asked, answered)
    letters = _letters(row)
    if "question" in row and "choices" not in row and letters:
        choices = {"text": [row[letter] for letter in letters], "label": letters}
        return {**row, "choices": choices}
    return row


def has_choices(row: Mapping[str, Any]) -> bool:
    """Whether a row, with or without entries that are None, has choices to answer with."""
    return row.get("choices") is not None or bool(_letters(row))


def index_of(answer: Any, choices: list[str], labels: list[str] | None = None) -> Any:
    """The index of the right choice, given as such, as a letter or label, or in its own words.

    Args:
        answer: as the row has it.
        choices: texts.
        labels: of the choices; None for A, B, ….

    Returns:
        An index, or the answer as it is if it names no choice.

    Raises:
        InputError: the answer is one choice's letter and another choice's text.
    """
    if not isinstance(answer, str):
        return answer
    labels = labels or list(ascii_uppercase[: len(choices)])
    named = answer.strip().rstrip(".)").upper()
    by_label = [i for i, label in enumerate(labels) if str(label).upper() == named]
    by_text = [i for i, choice in enumerate(choices) if choice == answer]
    found = sorted({*by_label, *by_text})
    if len(found) > 1:
        raise InputError(f"answer {answer!r} names more than one choice; give its index, from 0")
    if not found and answer.strip().isdecimal():  # tables without types have texts alone
        return int(answer)
    return found[0] if found else answer


def tools_of(tools: Any) -> tuple[dict[str, Any], ...]:
    """Schemas of tools: a list, or its JSON text as datasets hold it.

    Raises:
        InputError: something else.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"tools are not JSON ({error})") from error
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError("tools must be a list of JSON schemas, or the JSON text of one")
    return tuple(without_none(tool) for tool in tools)


def calls_of(calls: Any) -> list[dict[str, Any]]:
    """Calls of tools, with arguments as objects: OpenAI's have them as JSON text.

    Raises:
        InputError: a call has no function with a name, or its arguments are no object.
    """
    if not isinstance(calls, list):
        raise InputError(f"tool_calls is a {type(calls).__name__}; give a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError("a tool call needs a function with a name and arguments")
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError as error:
            raise InputError(f"arguments of a tool call are not JSON ({error})") from error
        if not isinstance(arguments, Mapping):
            kind = type(arguments).__name__
            raise InputError(f"arguments of a tool call are a {kind}; give an object")
        read.append(
            {
                "type": "function",
                "function": {"name": function["name"], "arguments": without_none(arguments)},
            }
        )
    return read


def plain(value: Any) -> Any:
    """Nested data as lists, dicts and Python's own values: datasets also give arrays and tuples."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):  # an array, a tensor, or one of their numbers
        value = value.tolist()
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def without_none(value: Any) -> Any:
    """Nested data without entries that are None, which datasets fill in."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def _message(turn: Any) -> Any:
    """A turn of ShareGPT as a message."""
    if not isinstance(turn, Mapping) or "from" not in turn or "role" in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    who = turn["from"]
    return {"role": _ROLES.get(who, who), "content": turn.get("value"), **rest}


def _single(row: Mapping[str, Any], asked: str, answered: str) -> Mapping[str, Any]:
    """A question and its answer as a conversation."""
    if row.get("history"):
        raise InputError(f"has a history beside {asked}; give the whole conversation as messages")
    messages = [
        {"role": "user", "content": asked_of(row, asked)},
        {"role": "assistant", "content": row[answered]},
    ]
    return {"messages": [*system_of(row), *messages]}


def asked_of(row: Mapping[str, Any], asked: str) -> str:
    """A question with what stands below it.

    Args:
        row: without entries that are None.
        asked: the question's column.

    Raises:
        InputError: one of them is no text.
    """
    parts = [row[asked], *(row[key] for key in BELOW_THE_QUESTION if row.get(key))]
    for part in parts:
        if not isinstance(part, str):
            raise InputError(f"{asked} must be a text and is {part!r}")
    return "\n\n".join(parts)


def system_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system's message that a row has in a column of its own, if any."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _letters(row: Mapping[str, Any]) -> list[str]:
    """The columns A, B, … that a row has."""
    return [letter for letter in ascii_uppercase if row.get(letter) is not None]
