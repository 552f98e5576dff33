"""What a chat template writes around the turns of a chat, as text and as tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from jinja2 import TemplateError

from budwood.errors import InputError, UnsupportedModelError
from budwood.tune.data.examples import Example
from budwood.tune.data.tokens import Part, text_tokens, tokens_behind

_MARK, _REPLY = "@@request@@", "@@reply@@"
_WORD = "a"
"""What a request may begin with; tokenizers join it with a space before it."""
DAY = date(2025, 1, 1)
"""The date that chat templates get as today's."""
_KNOWN_TO_TAKE_PARTS: dict[str, bool] = {}
"""Template → whether it reads contents as lists of parts alone."""
_MOST_KNOWN = 64


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    prompt: bool,
    where: str = "",
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """Render a conversation through the chat template.

    Args:
        tokenizer: with a chat template.
        messages: dicts of ``role`` and ``content``.
        prompt: continue to where the assistant begins.
        where: file and line of the conversation, for error messages.
        tools: schemas of tools.

    Raises:
        InputError: the chat template refuses the conversation, such as one with a system prompt.
    """
    template = dated_template(tokenizer)
    shaped = list(map(_in_parts, messages)) if _takes_parts(tokenizer, template) else messages
    try:
        try:
            return _applied(tokenizer, template, shaped, prompt, tools)
        except TypeError:  # some templates take the arguments of calls as text alone
            return _applied(tokenizer, template, map(_as_text, shaped), prompt, tools)
    except (TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where + ': ' if where else ''}the model's chat template refuses turns of {roles} "
            f"({reason}); leave out or rewrite what it refuses"
        ) from error


def _applied(
    tokenizer: Any,
    template: str,
    messages: Iterable[dict[str, Any]],
    prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    return tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=prompt,
    )


def _takes_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template reads contents as lists of parts alone, as those of some VLMs do."""
    if template not in _KNOWN_TO_TAKE_PARTS:
        asked = {"role": "user", "content": _MARK}
        shown = []
        for one in (asked, _in_parts(asked)):
            try:
                shown.append(_MARK in _applied(tokenizer, template, [one]))
            except (TemplateError, ValueError, TypeError):
                shown.append(False)
        if len(_KNOWN_TO_TAKE_PARTS) >= _MOST_KNOWN:
            _KNOWN_TO_TAKE_PARTS.clear()
        _KNOWN_TO_TAKE_PARTS[template] = shown == [False, True]
    return _KNOWN_TO_TAKE_PARTS[template]


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list with one text."""
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        given = call["function"]["arguments"]
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def dated_template(tokenizer: Any) -> str:
    """The chat template, in which today is always ``DAY``.

    Otherwise no run could be resumed, and no score be repeated, on the next day.

    Raises:
        ValueError: there is none.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return template
    codes = [f"%{code}" for code in ("-d", "-m", *"aAbBcdHIjmMpSxXyY")]
    filled = "".join(f"|replace('{code}', '{DAY.strftime(code)}')" for code in codes)
    return f"{{% macro strftime_now(form) %}}{{{{ form{filled} }}}}{{% endmacro %}}{template}"


def need_place(tokenizer: Any, example: Example, rendered: str) -> None:
    """Refuse a conversation if the chat template silently leaves out a part of it.

    Args:
        tokenizer: with a chat template.
        example: the conversation.
        rendered: what the template made of it.

    Raises:
        InputError: the template has no place for a part.
    """
    last = example.messages[-1]
    orders = [one["content"].strip() for one in example.messages if one["role"] == "system"]
    calls = [call for message in example.messages for call in message.get("tool_calls", ())]
    for one in example.messages:
        if one["role"] in ("user", "assistant") and _said(one) not in rendered:
            raise InputError(
                f"{example.where + ': ' if example.where else ''}the model's chat template leaves "
                f"out what the {one['role']} says; give the tokenizer another chat template"
            )
    missing = [
        *("a system message" for order in orders if order not in rendered),
        *(key for key in ("reasoning_content", "thinking") if last.get(key, "") not in rendered),
        *("tool_calls" for call in calls if call["function"]["name"] not in rendered),
    ]
    if example.tools and rendered == render(tokenizer, example.messages, False, example.where):
        missing.append("tools")
    if missing:
        raise InputError(_no_place(missing[0], example.where))


def _said(message: dict[str, Any]) -> str:
    """What a message says behind its thoughts, which templates drop from earlier turns."""
    return message["content"].rpartition("</think>")[2].strip()


def need_calls(message: dict[str, Any], turn: str, where: str = "") -> None:
    """Refuse an answer if the chat template leaves its calls of tools out of its turn.

    Args:
        message: of the assistant.
        turn: what the template made of it.
        where: file and line, for the error message.

    Raises:
        InputError: the name of a call is not in the turn.
    """
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in turn:
            raise InputError(_no_place("tool_calls", where))


def _no_place(part: str, where: str) -> str:
    return (
        f"{where + ': ' if where else ''}the model's chat template has no place for {part}; write "
        "into the content what the model should see"
    )


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """The tokens of a question up to where the assistant begins."""
    turns = [{"role": "user", "content": question}]
    return text_tokens(tokenizer, render(tokenizer, turns, True))


def lead_of(tokenizer: Any) -> str:
    """The text that a chat template writes between the assistant's start and its reply.

    An empty block of thoughts (Qwen3), or a space (Mistral); it is supervised with the answer.

    Args:
        tokenizer: with a chat template, or without one.
    """
    return _around_reply(tokenizer)[0]


def end_of_turn(tokenizer: Any) -> str:
    """The text that a chat template writes behind the assistant's reply, such as ``<|im_end|>``.

    Args:
        tokenizer: with a chat template, or without one.
    """
    return _around_reply(tokenizer)[1]


def _around_reply(tokenizer: Any) -> tuple[str, str]:
    """What a chat template writes before and behind the assistant's reply in its turn."""
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    asked, said = {"role": "user", "content": _MARK}, {"role": "assistant", "content": _REPLY}
    prompt = render(tokenizer, [asked], True)
    whole = render(tokenizer, [asked, said], False)
    lead, found, end = whole.removeprefix(prompt).partition(_REPLY)
    return (lead, end) if found and whole.startswith(prompt) else ("", "")


def tokens_before_request(tokenizer: Any) -> list[int]:
    """The tokens that a chat template puts before a user's message.

    Raises:
        UnsupportedModelError: the template shows no such place.
    """
    return around_request(tokenizer)[0]


def around_request(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a chat template puts before a user's message, and those up to the reply.

    A token that reaches into the message, such as that of a space and a word, is the message's.

    Raises:
        UnsupportedModelError: the template shows no such place.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedModelError(
            "the tokenizer has no chat template, which self-generated text needs; train with "
            "slim:texts=0"
        )
    turns = [{"role": "user", "content": _MARK}]
    before, found, behind = render(tokenizer, turns, True).partition(_MARK)
    prompt = Part(tokenizer, "", before + _WORD + behind)
    tokens = prompt.tokens[: prompt.n_up_to(len(before))]
    if not found or not tokens:
        raise UnsupportedModelError(
            "the chat template does not show where a user's turn begins, which self-generated text "
            "needs; train with slim:texts=0"
        )
    return tokens, tokens_behind(tokenizer, before + _MARK, behind)


def n_behind_turn(tokenizer: Any, end: str) -> int:
    """How many tokens a template writes behind the token that ends the assistant's turn.

    Args:
        tokenizer: with a chat template.
        end: of :func:`end_of_turn`.
    """
    behind = text_tokens(tokenizer, end)
    special = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    place = next((i for i, token in enumerate(behind) if token in special), None)
    return 0 if place is None else len(behind) - place - 1
