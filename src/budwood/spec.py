"""Names with options behind them, as command lines and configuration files have them."""

from __future__ import annotations

from typing import Any

from budwood.errors import InputError

_WORDS = {"true": True, "false": False, "none": None}


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``NAME:key=value+key=value`` into the name and its options.

    >>> parse_spec("adav:reserve=0.1+temperature=50")
    ('adav', {'reserve': 0.1, 'temperature': 50})

    Values are numbers, ``true``, ``false``, ``none``, or else strings.

    Raises:
        InputError: an option is malformed.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split("+")):
        key, equals, value = item.strip().partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{text!r}: {item!r} is not an option; write key=value")
        options[key] = _value(value)
    return name.strip(), options


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
