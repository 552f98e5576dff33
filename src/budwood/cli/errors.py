"""Errors become one line on standard error and an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from budwood.errors import BudwoodError

BAD_INPUT = 2
INTERRUPTED = 130
"""What typer returns after Ctrl-C."""

_NOT_WRITTEN = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO}
"""Of output that cannot be written."""

# The base of typer's usage errors. It has no public name: newer versions of typer contain click,
# older ones import it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """A group of commands that ends with one line and exit code 2 on bad input."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        _prepare_streams()
        try:
            code = super().main(*args, standalone_mode=False, **extra)
            if code == INTERRUPTED:
                typer.echo("budwood: interrupted", err=True)
            sys.stdout.flush()
            sys.exit(code)
        except _UsageError as error:
            hint = getattr(getattr(error, "ctx", None), "command_path", "budwood")
            _refuse(f"{_message(error).rstrip('.')}; see {hint} --help")
        except BudwoodError as error:
            _refuse(str(error))
        except typer.Abort:
            sys.exit(1)
        except BrokenPipeError:  # whoever reads has enough
            _drop_output()
            sys.exit(1)
        except OSError as error:
            if error.filename is not None or error.errno not in _NOT_WRITTEN:
                raise
            _drop_output()
            _end(f"cannot write the output: {error.strerror or error}")


def _message(error: Any) -> str:
    """What is wrong with an option, and what was given; newer versions of typer leave that out."""
    message = error.format_message()
    wrong: Any = getattr(error.__cause__, "errors", None)  # of pydantic
    if not callable(wrong):
        return message
    details: Any = wrong()
    return message.replace("Input should", f"{details[0]['input']!r} should")


def _prepare_streams() -> None:
    """Let output go on where it is closed, or in an encoding that lacks some characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, io.StringIO())
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Drop what is left of the output, so that Python does not try to write it in the end."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _refuse(message: str) -> NoReturn:
    _end(message, BAD_INPUT)


def _end(message: str, code: int = 1) -> NoReturn:
    line = " ".join(message.split())
    typer.echo(f"budwood: error: {line}", err=True)
    sys.exit(code)
