"""Read clouds and meshes from files. ``FORMATS`` says which module reads which format."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from budwood.errors import InputError
from budwood.points.io.cloud import Assumed, Cloud, ReadOptions, crop, make_cloud
from budwood.points.io.columns import no_effect
from budwood.points.io.mesh_files import gltf_files
from budwood.points.io.tables import cloud_of
from budwood.registry import Registry


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        reader: ``"module:function"`` below ``budwood.points.io``: takes the file and
            :class:`ReadOptions`, returns a :class:`Cloud`.
        up: the axis that points up in such files, by their specification or by custom: z in scans,
            y in meshes and in arrays of the usual datasets.
        units: of their coordinates, likewise; None: unknown.
        names_columns: whether such files say what their values are, or have no columns.
    """

    reader: str
    up: str = "y"
    units: str | None = None
    names_columns: bool = True


FORMATS = {
    ".ply": Format("meshes:read_mesh"),
    ".pcd": Format("pcd:read_pcd", "z", "m"),
    ".las": Format("las:read_las", "z", "m"),
    ".laz": Format("las:read_las", "z", "m"),
    ".e57": Format("e57:read_e57", "z", "m"),
    ".bin": Format("bins:read_bin", "z", "m", names_columns=False),
    # y in ShapeNet's; the reader says z for Leica's
    ".pts": Format("tables:read_pts", names_columns=False),
    ".npy": Format("tables:read_npy", names_columns=False),
    ".npz": Format("tables:read_npz", names_columns=False),
    ".xyz": Format("tables:read_text", names_columns=False),
    ".txt": Format("tables:read_text", names_columns=False),
    ".csv": Format("tables:read_text", names_columns=False),
    ".off": Format("meshes:read_off"),
    ".obj": Format("meshes:read_mesh"),
    ".stl": Format("meshes:read_mesh"),
    ".glb": Format("meshes:read_mesh", "y", "m"),
    ".gltf": Format("meshes:read_mesh", "y", "m"),
    ".3mf": Format("meshes:read_mesh", "z"),  # which names its units
}
"""Suffix → format. A new format is a function and a line here."""

READERS = Registry(
    "file format",
    {suffix: f"budwood.points.io.{entry.reader}" for suffix, entry in FORMATS.items()},
)

__all__ = [
    "FORMATS",
    "READERS",
    "Assumed",
    "Cloud",
    "Format",
    "ReadOptions",
    "cloud_of",
    "crop",
    "find_files",
    "make_cloud",
    "read",
    "stem",
    "unknown_files",
]


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

    Beams without a return (rows of zeros or of NaN) are left out. What was assumed about the file
    is in ``assumed`` of the result: its columns, its upward axis, its units, the points left out.

    Args:
        path: a file of a format in ``READERS``.
        columns: letters of the columns of a table, such as ``"xyz_rgb"``; by default those that
            the file names, or by the values, see :func:`budwood.points.io.columns.guess_columns`.
        invalid: ``"error"``, or ``"drop"`` to leave out points of which one or two coordinates are
            NaN or infinite as well.
        n_points: points sampled from a mesh.
        seed: seed of that sampling.
        box: x0, y0, z0, x1, y1, z1 in the units of the file: keep the points inside.

    Raises:
        InputError: no such file, an unknown format, a file that is empty, truncated or damaged,
            wrong columns, a bare table that could have several, or NaN or infinite coordinates.
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
    suffix = source.suffix.lower()
    if suffix not in READERS:
        known = ", ".join(READERS.names())
        raise InputError(f"{source} is of no known format; known: {known}")
    try:
        cloud = READERS.get(suffix)(source, options)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from None
    except MemoryError:
        raise InputError(f"{source} does not fit into memory; thin it out first") from None
    if suffix in FORMATS and FORMATS[suffix].names_columns:
        cloud = cloud.noting(no_effect(columns, f"{suffix} files"))
    return _by_format(cloud, suffix) if box is None else crop(_by_format(cloud, suffix), box)


def _by_format(cloud: Cloud, suffix: str) -> Cloud:
    """Fill in the axis and the units that the reader left open."""
    custom = FORMATS.get(suffix, Format(""))
    assumed = cloud.assumed
    return cloud.assuming(up=assumed.up or custom.up, units=assumed.units or custom.units)


def find_files(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Path]:
    """List the files to read: those given, and the sorted files of known formats in folders given.

    Hidden files and folders inside a folder are left out: editors and macOS write files such as
    ``._scan.ply``, which are not clouds. So are the .bin files that a .gltf beside them names.

    Raises:
        InputError: a path does not exist, or a folder has no file of a known format.
    """
    files: list[Path] = []
    for path in _paths(paths):
        if not path.exists():
            raise InputError(f"{path} does not exist")
        files += _known_in(path) if path.is_dir() else [path]
    return files


def unknown_files(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
) -> dict[str, int]:
    """Count the files in folders that :func:`find_files` leaves out: suffix → number, most first.

    Hidden files do not count. Files without a suffix count under ``""``.
    """
    left_out: Counter[str] = Counter()
    for folder in filter(Path.is_dir, _paths(paths)):
        left_out.update(
            path.suffix.lower() for path in _visible(folder) if path.suffix.lower() not in READERS
        )
    return dict(left_out.most_common())


def stem(path: Path) -> str:
    """The name of a file without its suffixes: nuScenes writes ``.pcd.bin``."""
    name = path.name
    while (suffix := Path(name).suffix).lower() in READERS:
        name = name.removesuffix(suffix)
    return name


def _paths(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _known_in(folder: Path) -> list[Path]:
    files = [path for path in _visible(folder) if path.suffix.lower() in READERS]
    if not files:
        left_out = ", ".join(f"{n} {suffix}" for suffix, n in unknown_files(folder).items())
        seen = f" (it has {left_out})" if left_out else ""
        known = ", ".join(READERS.names())
        raise InputError(f"{folder} has no file of a known format{seen}: {known}")
    buffers = {
        path.parent / name
        for path in files
        if path.suffix.lower() == ".gltf"
        for name in _buffers(path)
    }
    return sorted((path for path in files if path not in buffers), key=_in_order)


def _in_order(path: Path) -> list[tuple[str, int]]:
    """A key by which numbers in names count as numbers: 2.bin comes before 10.bin."""
    pieces = re.findall(r"(\D*)(\d*)", str(path))
    return [(text, int(number or -1)) for text, number in pieces]


def _buffers(path: Path) -> list[str]:
    try:
        return gltf_files(path, "buffers")
    except (InputError, OSError):  # reading it will say so
        return []
