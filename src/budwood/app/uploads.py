"""Files that visitors send: what is refused, and messages without directories of the machine."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from budwood.errors import BudwoodError, InputError

MAX_FILE = "50mb"
"""Largest upload."""
MAX_UNPACKED = 500_000_000
"""Bytes that the parts of an uploaded .npz or .3mf may have together."""


@contextmanager
def uploaded(file: str) -> Iterator[None]:
    """Name an uploaded file in messages as its sender does, without its folder.

    Raises:
        BudwoodError: as inside the block, in other words.
    """
    try:
        yield
    except BudwoodError as error:
        path = Path(file)
        raise type(error)(str(error).replace(str(path), path.name)) from error


def check_cloud_file(file: Path) -> None:
    """Refuse a cloud that unpacks to too much, or that names files outside its own folder.

    Raises:
        InputError: as above.
    """
    from budwood.points.io.mesh_files import named_files

    if zipfile.is_zipfile(file):
        _check_archive(file)
    for name in named_files(file):
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise InputError(
                f"{file} names a file outside its folder ({name}); give a mesh that holds all of "
                "it, such as .glb or .ply"
            )


def _check_archive(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except zipfile.BadZipFile:  # the reader says so
        return
    if size > MAX_UNPACKED:
        raise InputError(
            f"{file} unpacks to {size:,} bytes, and the page takes {MAX_UNPACKED:,}; thin it out "
            "first"
        )
