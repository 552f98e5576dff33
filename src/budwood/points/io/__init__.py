"""Read clouds and meshes from files. A new format is a function and a line in ``READERS``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from budwood.errors import InputError
from budwood.points.io.cloud import Cloud, ReadOptions, crop, make_cloud
from budwood.registry import Registry

READERS = Registry(
    "file format",
    {
        ".ply": "budwood.points.io.meshes:read_mesh",
        ".pcd": "budwood.points.io.scans:read_pcd",
        ".las": "budwood.points.io.scans:read_las",
        ".laz": "budwood.points.io.scans:read_las",
        ".npy": "budwood.points.io.tables:read_npy",
        ".npz": "budwood.points.io.tables:read_npz",
        ".bin": "budwood.points.io.tables:read_bin",
        ".xyz": "budwood.points.io.tables:read_text",
        ".txt": "budwood.points.io.tables:read_text",
        ".csv": "budwood.points.io.tables:read_text",
        ".off": "budwood.points.io.meshes:read_mesh",
        ".obj": "budwood.points.io.meshes:read_mesh",
        ".stl": "budwood.points.io.meshes:read_mesh",
        ".glb": "budwood.points.io.meshes:read_mesh",
    },
)

__all__ = ["READERS", "Cloud", "ReadOptions", "crop", "find_files", "make_cloud", "read"]


def read(
    path: str | os.PathLike[str],
    *,
    columns: str | None = None,
    invalid: str = "error",
    n_points: int = 10_000,
    seed: int = 0,
    box: Sequence[float] | None = None,
) -> Cloud:
    """Read a cloud, or sample a mesh.

    Args:
        path: a file of a format in ``READERS``.
        columns: letters of the columns of a table, such as ``"xyz_rgb"``; see
            :func:`budwood.points.io.tables.split_columns`.
        invalid: ``"error"``, or ``"drop"`` to leave out points with NaN or infinite coordinates.
        n_points: points sampled from a mesh.
        seed: seed of that sampling.
        box: x0, y0, z0, x1, y1, z1 in the units of the file: keep the points inside.

    Raises:
        InputError: no such file, an unknown format, a file that is empty, truncated or damaged,
            wrong columns, or NaN or infinite coordinates.
        MissingPackageError: the library for this format is not installed.
    """
    options = ReadOptions(columns, invalid, n_points, seed)
    source = Path(path)
    if source.is_dir():
        raise InputError(f"{source} is a folder; find_files() lists the files in it")
    try:
        size = source.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {source}: {reason}") from None
    if size == 0:
        raise InputError(f"{source} is empty")
    if source.suffix.lower() not in READERS:
        known = ", ".join(READERS.names())
        raise InputError(f"{source} is of no known format; known: {known}")
    try:
        cloud = READERS.get(source.suffix.lower())(source, options)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from None
    except MemoryError:
        raise InputError(f"{source} does not fit into memory; thin it out first") from None
    return cloud if box is None else crop(cloud, box)


def find_files(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Path]:
    """List the files to read: those given, and the sorted files of known formats in folders given.

    Hidden files and folders inside a folder are left out: editors and macOS write files such as
    ``._scan.ply``, which are not clouds.

    Raises:
        InputError: a path does not exist, or a folder has no file of a known format.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            files += _files_in(path)
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path} does not exist")
    return files


def _files_in(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in READERS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"{folder} has no file of a known format: {', '.join(READERS.names())}")
    return sorted(files)
