"""Names with options behind them, as command lines and configuration files have them."""

from __future__ import annotations

import dataclasses
from typing import Any

from budwood.errors import InputError
from budwood.registry import Registry

_WORDS = {"true": True, "false": False, "none": None}


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``NAME:key=value+key=value`` into the name and its options.

    >>> parse_spec("adav:reserve=0.1+temperature=50")
    ('adav', {'reserve': 0.1, 'temperature': 50})

    Values are numbers, ``true``, ``false``, ``none``, or else strings.

    Raises:
        InputError: an option is malformed, or given twice.
    """
    name, colon, rest = text.partition(":")
    if colon and not rest.strip():
        raise InputError(f"{text!r} ends in a colon; write key=value behind it, or leave it out")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split("+")):
        key, equals, value = item.strip().partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{text!r}: {item!r} is not an option; write key=value")
        if key in options:
            raise InputError(f"{text!r} gives {key} twice; give it once")
        options[key] = _value(value)
    return name.strip(), options


def build(spec: str, known: Registry, **given: Any) -> Any:
    """Make what a name and its options stand for: a dataclass, whose fields are the options.

    Args:
        spec: ``NAME:field=value+field=value``.
        known: dataclasses by name.
        given: fields that are set unless the options do.

    Raises:
        UnknownNameError: unknown name.
        InputError: an unknown option, or a value that it does not take.
    """
    name, values = parse_spec(spec) if isinstance(spec, str) else (spec, {})
    chosen = known.get(name)
    defaults = {one.name: one.default for one in dataclasses.fields(chosen) if one.repr}
    for option, value in values.items():
        if option not in defaults:
            has = ", ".join(defaults) or "none"
            raise InputError(f"{known.kind} {name!r} has no parameter {option!r}; it has: {has}")
        kind = type(defaults[option])
        if kind is float and type(value) is int:
            values[option] = value = float(value)
        if type(value) is not kind:
            raise InputError(
                f"{option}={value!r} of {known.kind} {name!r} must be of type {kind.__name__}; the "
                f"default is {defaults[option]}"
            )
    return chosen(**{**given, **values})


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
