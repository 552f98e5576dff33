"""The kind of command that every part of the command line is made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

_PATHS = re.compile(r"^(?!.*\bID\b).*\b(FILE|DIR|IMAGE|RECORD|ADAPTER|FRAME|CLOUD|TRAIN)\b")
"""In metavars of paths. A name on the hub (ID) is checked where it is looked up."""


class Command(TyperCommand):
    """A command that refuses empty paths, and says so where a list is given twice.

    An empty path, such as that of a shell variable that is not set, would be the current folder. Of
    a list that is given twice the last alone counts. Lists are the options whose metavar ends in
    ``,…``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        params: list[Any] = self.params  # of types that are not public
        for param in params:
            value, metavar = values.get(param.name), param.metavar or ""
            given = value if isinstance(value, list | tuple) else [value]
            if "" in given and _PATHS.search(metavar):
                kind = metavar.rstrip(",….")
                raise typer.BadParameter(f"it is empty; give {kind}", ctx=ctx, param=param)
        for option in dict.fromkeys(order):
            if (option.metavar or "").endswith(",…") and order.count(option) > 1:
                typer.echo(
                    f"note: {option.opts[0]} is given {order.count(option)} times, and the last "
                    "one counts; for a longer list, separate its items by commas",
                    err=True,
                )
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """A group of commands of the kind above, with plain help texts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(rich_markup_mode=None, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:  # type: ignore[override]
        return super().command(name, cls=Command, **options)
