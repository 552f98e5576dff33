"""Files that are written whole or not at all, JSON files, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from budwood.errors import InputError, OutputError, first_line


def cache_folder() -> Path:
    """Where budwood keeps what it can make again: ``$BUDWOOD_CACHE``, or ``~/.cache/budwood``."""
    return Path(os.environ.get("BUDWOOD_CACHE") or Path.home() / ".cache" / "budwood")


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify a JSON value; other values count as text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file or folder that gets its final name only when it is complete.

    Args:
        path: the target; missing folders above it are made. A file that exists is replaced and
            keeps its permissions. A symbolic link stays, and what it leads to is written.
        write: writes to the path that it is given, which has the same name in a temporary folder.

    Raises:
        OutputError: it cannot be written.
    """
    given, path = path, target_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
            part = Path(folder, given.name)  # whose suffix gives the format
            write(part)
            if path.is_file() and part.is_file():
                part.chmod(stat.S_IMODE(path.stat().st_mode))
            part.replace(path)
    except (OSError, SafetensorError) as error:
        cause = error.__cause__ or error  # what drew a figure has named the temporary file
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise OutputError(f"cannot write {given}: {reason}") from error


def target_of(path: Path) -> Path:
    """Where a file is written: what a symbolic link leads to, or the path itself.

    Raises:
        OutputError: a link leads to itself.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise OutputError(f"{path} is a link that leads to itself; remove it, or give another name")
    return target


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def need_parent(path: Path) -> None:
    """Check that the folder exists in which a file or folder will be made.

    Raises:
        OutputError: there is no such folder, or it is a file.
    """
    parent = path.absolute().parent
    if parent.exists() and not parent.is_dir():
        raise OutputError(f"{path.parent} is a file; give a folder")
    if not parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}; make it first, or give another")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: it can't be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError:
        raise InputError(f"{path} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
