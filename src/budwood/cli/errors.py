"""Errors become one line on standard error and an exit code."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from budwood.errors import BudwoodError

BAD_INPUT = 2
INTERRUPTED = 130
"""What typer returns after Ctrl-C."""

# The base of typer's usage errors. It has no public name: newer versions of typer contain click,
# older ones import it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """A group of commands that ends with one line and exit code 2 on bad input."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
            if code == INTERRUPTED:
                typer.echo("budwood: interrupted", err=True)
            sys.exit(code)
        except _UsageError as error:
            hint = getattr(getattr(error, "ctx", None), "command_path", "budwood")
            message = error.format_message()  # type: ignore[attr-defined]
            _refuse(f"{message.rstrip('.')}; see {hint} --help")
        except BudwoodError as error:
            _refuse(str(error))
        except typer.Abort:
            sys.exit(1)


def _refuse(message: str) -> NoReturn:
    line = " ".join(message.split())
    typer.echo(f"budwood: error: {line}", err=True)
    sys.exit(BAD_INPUT)
