"""The kind of command that every part of the command line is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command that says so where a list is given twice, of which the last alone counts.

    Lists are the options whose metavar ends in ``,…``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        order = self.make_parser(ctx).parse_args(list(args))[2]
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
