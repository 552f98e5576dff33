"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from budwood.errors import OutputError, first_line


def cache_folder() -> Path:
    """Where budwood keeps what it can make again: ``$BUDWOOD_CACHE``, or ``~/.cache/budwood``."""
    return Path(os.environ.get("BUDWOOD_CACHE") or Path.home() / ".cache" / "budwood")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by its final name only when it is complete, with the folders that it needs.

    Args:
        path: the file; one that exists is replaced.
        write: writes to the path that it is given, of the same name in a folder of its own.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
            part = Path(folder, path.name)
            write(part)
            part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"cannot write {path}: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """The same for a text, in UTF-8.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
