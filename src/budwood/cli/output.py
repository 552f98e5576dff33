"""Checks of the files and folders that a command will write, made before its slow work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from budwood.errors import InputError, OutputError
from budwood.files import need_parent, target_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FOLDER_INPUTS = (".bin", ".json", ".model", ".safetensors", ".txt")
"""Suffixes of files in folders that are read: models, adapters, calibrations, tables of poses."""


def reserve(path: Path, force: bool = False, reads: Iterable[Path | str | None] = ()) -> Path:
    """Check that a file can be written.

    Args:
        path: the file.
        force: whether one that exists may be overwritten.
        reads: files and folders that the command reads, which it never overwrites.

    Raises:
        InputError: it is one of the files that are read.
        OutputError: its folder does not exist, it exists and ``force`` is off, or it cannot be
            written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give a file")
    target = target_of(path)
    if target.exists() and any(_belongs(target, Path(read)) for read in reads if read is not None):
        raise InputError(f"{path} is one of the files that are read; give another name")
    if target.exists() and not force:
        raise OutputError(f"{path} exists; choose another name, or overwrite it with --force")
    need_parent(target)
    try:
        # Trying is the only test that sees read-only file systems and full disks as well.
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(b"budwood")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _belongs(file: Path, read: Path) -> bool:
    """Whether a file is one that is read, or belongs to a folder that is read."""
    if read.is_dir():
        return file.suffix in FOLDER_INPUTS and file.resolve().parent == read.resolve()
    return file.resolve() == read.resolve()


def reserve_picture(
    path: Path, force: bool = False, reads: Iterable[Path | str | None] = ()
) -> Path:
    """Check that a picture can be written; its suffix gives the format.

    Args:
        path: the file.
        force: as of :func:`reserve`.
        reads: likewise.

    Raises:
        InputError: as in :func:`reserve`.
        OutputError: as in :func:`reserve`, or the suffix is that of no format.
    """
    if path.suffix.lower() not in PICTURES:
        raise OutputError(f"{path} must end in .png, .jpg or .webp, which gives the format")
    return reserve(path, force, reads)


def make_folder(path: Path) -> Path:
    """Make a folder for the files of a command; one that exists stays as it is.

    Raises:
        OutputError: it is a file, the folder above it does not exist, or it cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; give a folder")
    need_parent(path)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {path}: {error.strerror or error}") from error
    return path
