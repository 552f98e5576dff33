"""Compare what mesh files declare with what they hold: trimesh reads part of a file silently."""

from __future__ import annotations

import itertools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from budwood.errors import InputError, first_line
from budwood.optional import is_installed
from budwood.points.io.fields import letters_of
from budwood.points.io.mesh_files import gltf_files, gltf_json
from budwood.points.io.ply_header import PLY_BYTES, PLY_WHOLE, PlyElement, ply_elements, ply_header

COMPRESSIONS = {"KHR_draco_mesh_compression": "DracoPy", "EXT_meshopt_compression": None}
"""Compressed meshes in glTF, and the packages by which trimesh reads them."""


def check_stl(path: Path) -> None:
    """Check that an ASCII file ends its solid, and a binary one has the faces it declares."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(84)
        if head[:5].lower() == b"solid" and b"\0" not in head:
            file.seek(max(0, size - 256))
            if b"endsolid" not in file.read().lower():
                raise InputError(f"{path} is truncated: its solid does not end")
            return
    if len(head) < 84:
        raise InputError(f"{path} is truncated: {size} bytes are too few for STL")
    n_faces = struct.unpack("<I", head[80:])[0]
    if size < 84 + 50 * n_faces:
        raise InputError(f"{path} is truncated: {(size - 84) // 50} of {n_faces} faces")


def check_glb(path: Path) -> None:
    """Check the length in the header."""
    with path.open("rb") as file:
        head = file.read(12)
    if len(head) < 12 or head[:4] != b"glTF":
        raise InputError(f"{path} is not a GLB file")
    declared = struct.unpack("<I", head[8:])[0]
    if path.stat().st_size < declared:
        raise InputError(f"{path} is truncated: {path.stat().st_size} of {declared} bytes")
    _check_compression(path)


def check_obj(path: Path) -> None:
    """Refuse a last line that is cut within a record; a cut between records does not show."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 4096))
        tail = file.read().decode("utf-8", errors="replace")
    if tail.endswith("\n") or not tail:
        return
    fields = tail.splitlines()[-1].split()
    if fields and fields[0] in ("v", "f") and len(fields) < 4:
        raise InputError(f"{path} is truncated: its last line is {' '.join(fields)!r}")


def check_ply(path: Path) -> None:
    """Check the properties, and the rows of an ASCII file or the least size of a binary one."""
    with path.open("rb") as file:
        header = ply_header(path, file)
        elements = ply_elements(path, header)
        _check_ply_properties(path, elements)
        if any(words[:2] == ["format", "ascii"] for words in header):
            _check_ply_rows(path, file, [element for element in elements if element.n_rows])
            return
        left = path.stat().st_size - file.tell()
    # Lists may be of any length. trimesh refuses a file that is cut within one, not before all.
    widths = [sum(PLY_BYTES.get(name, 1) for name in element.properties) for element in elements]
    least = sum(element.n_rows * width for element, width in zip(elements, widths))
    if left < least:
        raise InputError(f"{path} is truncated: {left} of {least} bytes or more")


def _check_ply_properties(path: Path, elements: list[PlyElement]) -> None:
    for element in elements:
        if element.name == "vertex" and not set("xyz") <= set(letters_of(element.names)):
            names = ", ".join(element.names)[:60] or "none"
            raise InputError(f"{path} has no x, y and z; the properties of its points are {names}")
        wide = [kind for kind in element.color_types() if kind in PLY_WHOLE]
        if element.name == "face" and wide:
            raise InputError(f"{path} has colours of faces as {wide[0]}; write them as uchar")


def _check_ply_rows(path: Path, file: BinaryIO, elements: list[PlyElement]) -> None:
    """Count the rows of an ASCII body; ``elements`` are those with rows."""
    wanted = sum(element.n_rows for element in elements)
    rows = itertools.islice((line for line in file if line.strip()), wanted)
    n_rows, last = 0, b""
    for n_rows, last in enumerate(rows, 1):  # noqa: B007
        pass
    if n_rows < wanted:
        raise InputError(f"{path} is truncated: {n_rows} of {wanted} rows")
    values = last.split()
    at = 0
    for is_list in elements[-1].is_list if elements else ():
        length = int(values[at]) if is_list and at < len(values) and values[at].isdigit() else 0
        at += 1 + length
    if len(values) < at:
        raise InputError(f"{path} is truncated: its last row has {len(values)} of {at} values")


def check_gltf(path: Path) -> None:
    """Check that the JSON is whole, and the buffers are there."""
    _check_compression(path)
    for name in gltf_files(path, "buffers"):
        if not (path.parent / name).is_file():
            raise InputError(f"{path} needs {name}, which is not beside it")


def _check_compression(path: Path) -> None:
    required = gltf_json(path).get("extensionsRequired", [])
    for extension, package in COMPRESSIONS.items():
        if extension in required and (package is None or not is_installed(package)):
            way_out = f"install {package} (pip install {package}), or " if package else ""
            raise InputError(f"{path} is compressed ({extension}); {way_out}save it uncompressed")


def check_3mf(path: Path) -> None:
    """Check that the archive is whole and has a model."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.lower() for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise InputError(f"{path} is truncated or no 3MF file: {first_line(error)}") from None
    if not any(name.endswith(".model") for name in names):
        raise InputError(f"{path} is no 3MF file: it has no 3dmodel.model")


CHECKS: dict[str, Callable[[Path], None]] = {
    ".stl": check_stl,
    ".glb": check_glb,
    ".gltf": check_gltf,
    ".3mf": check_3mf,
    ".obj": check_obj,
    ".ply": check_ply,
}
