"""The two names of a cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before.

budwood says ``past_key_values`` inside, and speaks to the model by the name that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from budwood.unwrap import innermost, signature

NAME, NEW_NAME = "past_key_values", "cache"


def takes_new_name(model: Any) -> bool:
    """Whether a model, without its wrappers, calls its cache ``cache``."""
    return NEW_NAME in signature(innermost(model).forward).parameters


def name_for(model: Any) -> str:
    """What a model calls its cache."""
    return NEW_NAME if takes_new_name(model) else NAME


def by_one_name(call: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call, the cache under its old name whichever was given."""
    named = dict(call)
    if NEW_NAME in named:
        cache = named.pop(NEW_NAME)
        named.setdefault(NAME, cache)
    return named


def by_new_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the cache under its old name and passes it on under the new one."""

    def renamed(**call: Any) -> Any:
        if NAME in call:
            call[NEW_NAME] = call.pop(NAME)
        return function(**call)

    return renamed


def cache_of(output: Any) -> Any:
    """The cache that a call returned; None if it returned none."""
    for name in (NEW_NAME, NAME):
        cache = getattr(output, name, None)
        if cache is not None:
            return cache
    return None
