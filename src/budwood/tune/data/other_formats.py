"""Forms of rows that are in use elsewhere, turned into those of ``examples``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

ABOVE_THE_QUESTION = ("article",)
"""Columns that the question is about: RACE's."""

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

_ANSWERED = ("answer", "completion", "output", "response", "messages", "conversations")
"""Columns with what is trained on, apart from the choices of a question."""
_VERDICTS = ("true", "false", "0", "1")
"""Texts of a label that says whether an answer is good."""


def canonical(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row in one of the forms that ``examples`` reads; others come back as they are.

    Understood are ShareGPT's ``conversations`` with ``from`` and ``value``, also under
    ``messages``; single questions and answers such as Alpaca's ``instruction``, ``input`` and
    ``output``; and choices under ``options``, or in columns of their own: ``A``, ``B``, … or
    ``option_a``, ``option_b``, ….

    Args:
        row: without entries that are None.

    Raises:
        InputError: answers that are not all to be learnt, or a history beside a question.
    """
    _refuse_judged(row)
    talk = row.get("messages", row.get("conversations"))
    if isinstance(talk, list):
        return {**row, "messages": [_message(turn) for turn in talk]}
    for asked, answered in _ASKED_AND_ANSWERED:
        if asked in row and answered in row:
            return _single(row, asked, answered)
    if "question" in row and "choices" not in row and (choices := _choices(row)):
        return {**row, "choices": choices}
    return row


def _refuse_judged(row: Mapping[str, Any]) -> None:
    """Refuse rows that say how good an answer is: training would teach the bad ones as well."""
    if isinstance(row.get("rejected"), (str, list)):
        raise InputError(
            "is a preference, with a rejected answer; train on it with TRL's DPOTrainer and "
            "SlimConfig"
        )
    if "completions" in row and "labels" in row:
        raise InputError(
            "has completions and labels, the steps of an answer and whether each is right, which "
            "train a reward model; give the right answer as completion"
        )
    label = row.get("label")
    is_verdict = label in (0, 1) or str(label).strip().lower() in _VERDICTS
    answered = any(isinstance(row.get(key), (str, list)) for key in _ANSWERED)
    if is_verdict and answered and not has_choices(row):
        raise InputError(
            f"has an answer with label={label!r}, which says whether it is desirable; train on it "
            "with TRL's KTOTrainer and SlimConfig, or keep the desirable rows and leave label out"
        )


def has_choices(row: Mapping[str, Any]) -> bool:
    """Whether a row, with or without entries that are None, has choices to answer with."""
    return row.get("choices") is not None or bool(_choices(row))


def index_of(answer: Any, choices: list[str], labels: list[Any] | None = None) -> int | None:
    """The index of the right choice, given as such, as a letter or label, or in its own words.

    A number is a label where labels are numbers, and else an index from 0.

    Args:
        answer: as the row has it.
        choices: texts.
        labels: of the choices; None for A, B, ….

    Returns:
        An index, or None if the answer is none of the choices.

    Raises:
        InputError: the answer is several choices, such as one's letter and another's text.
    """
    if isinstance(answer, bool) or not isinstance(answer, (int, str)):
        return None
    text, numbered = str(answer), has_numbers(labels)
    found = _named(text, choices, labels) if numbered or isinstance(answer, str) else []
    if len(found) > 1:
        way = "give each choice a label of its own" if numbered else "give its index, from 0"
        raise InputError(f"answer {answer!r} names more than one choice; {way}")
    if found:
        return found[0]
    # Tables without types have numbers as texts.
    is_index = not numbered and text.strip().isdecimal() and int(text) < len(choices)
    return int(text) if is_index else None


def _named(text: str, choices: list[str], labels: Sequence[Any] | None) -> list[int]:
    """The choices with a label or a text; labels go before texts where they are numbers."""
    named = text.strip().rstrip(".)").upper()
    letters = labels or ascii_uppercase[: len(choices)]
    by_label = [i for i, label in enumerate(letters) if str(label).strip().upper() == named]
    if by_label and has_numbers(labels):
        return by_label
    by_text = [i for i, choice in enumerate(choices) if choice == text]
    return sorted({*by_label, *by_text})


def has_numbers(labels: Sequence[Any] | None) -> bool:
    """Whether some labels of choices are numbers, so that a number is a label and no index."""
    return any(str(label).strip().isdecimal() for label in labels or ())


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
    """A question with what stands above and below it.

    Args:
        row: without entries that are None.
        asked: the question's column.

    Raises:
        InputError: one of them is no text.
    """
    columns = (*ABOVE_THE_QUESTION, asked, *BELOW_THE_QUESTION)
    parts = [row[key] for key in columns if row.get(key) or key == asked]
    for part in parts:
        if not isinstance(part, str):
            raise InputError(f"{asked} must be a text and is {part!r}")
    return "\n\n".join(parts)


def system_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system's message that a row has in a column of its own, if any."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _choices(row: Mapping[str, Any]) -> Any:
    """Choices under other names, as ``choices`` has them: a list, or texts and labels."""
    options = row.get("options")
    if isinstance(options, list):  # MMLU-Pro and RACE
        return options
    if not isinstance(options, Mapping):  # of MedQA they are by letter
        options = row
    for form in ("{}", "option_{}"):
        found = {
            letter: options[key]
            for letter in ascii_uppercase
            if options.get(key := form.format(letter if form == "{}" else letter.lower()))
            is not None
        }
        if found:
            return {"text": list(found.values()), "label": list(found)}
    return None
