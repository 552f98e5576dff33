"""Docstrings as Markdown: what they have of Sphinx and of doctest, in the API reference's terms."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`")
_PROMPT = re.compile(r"(?:^[ \t]*>>> .*\n(?:[ \t]*\S.*\n)*)+", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Turn roles into code, ``::`` into a colon, and lines behind ``>>>`` into a code block."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute that was found."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The text of a docstring with roles, double colons and prompts replaced."""
    text = _ROLE.sub(r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return _PROMPT.sub(lambda match: _fenced(match[0]), text + "\n").rstrip("\n")


def _fenced(lines: str) -> str:
    indent = re.match(r"[ \t]*", lines)[0]  # type: ignore[index]
    code = re.sub(r"[ \t]*# doctest: .*", "", lines)
    return f"{indent}```pycon\n{code}{indent}```\n"
