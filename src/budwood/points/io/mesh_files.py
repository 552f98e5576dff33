"""Files that lie beside a mesh: buffers, materials and textures."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from budwood.errors import InputError, first_line

PLY_TEXTURE = "comment TextureFile "


def gltf_json(path: Path) -> dict[str, Any]:
    """The description in a .gltf, or in the first chunk of a .glb.

    Raises:
        InputError: it is not whole JSON.
    """
    try:
        if path.suffix.lower() == ".glb":
            with path.open("rb") as file:
                size = struct.unpack("<12xI4x", file.read(20))[0]
                content = json.loads(file.read(size).decode("utf-8"))
        else:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise TypeError("it is no object")
    except (ValueError, TypeError, struct.error, RecursionError) as error:
        raise InputError(f"{path} is truncated or no glTF file: {first_line(error)}") from None
    return content


def gltf_files(path: Path, kind: str) -> list[str]:
    """The files that a .gltf names, relative to it.

    Args:
        path: a .gltf file.
        kind: ``"buffers"`` or ``"images"``.

    Raises:
        InputError: it is not whole JSON, or has entries of another form.
    """
    try:
        uris = [entry.get("uri") for entry in gltf_json(path).get(kind, [])]
    except (AttributeError, TypeError) as error:
        raise InputError(f"{path} is truncated or no glTF file: {first_line(error)}") from None
    return [unquote(uri) for uri in uris if isinstance(uri, str) and not uri.startswith("data:")]


def named_files(path: Path) -> list[str]:
    """The files that a mesh itself names, there or not: buffers, materials and textures."""
    suffix = path.suffix.lower()
    if suffix == ".gltf":
        return gltf_files(path, "buffers") + gltf_files(path, "images")
    if suffix == ".obj":
        return _named(path, "mtllib")
    return _ply_textures(path) if suffix == ".ply" else []


def missing_files(path: Path) -> list[str]:
    """The materials and textures that a mesh names and that are not there."""
    names = {".obj": _obj_files, ".gltf": _gltf_images, ".ply": _ply_textures}.get(
        path.suffix.lower()
    )
    if names is None:
        return []
    return [name for name in dict.fromkeys(names(path)) if not (path.parent / name).is_file()]


def _gltf_images(path: Path) -> list[str]:
    return gltf_files(path, "images")


def _obj_files(path: Path) -> Iterator[str]:
    """The material libraries of an .obj, and the textures of those that are there."""
    for library in _named(path, "mtllib"):
        yield library
        if (path.parent / library).is_file():
            yield from _named(path.parent / library, "map_kd")


def _ply_textures(path: Path) -> list[str]:
    with path.open(encoding="latin-1") as file:
        head = itertools.takewhile(lambda line: line.strip() != "end_header", file)
        return [line[len(PLY_TEXTURE) :].strip() for line in head if line.startswith(PLY_TEXTURE)]


def _named(path: Path, keyword: str) -> list[str]:
    """What follows a keyword in the lines of a text; a texture's options stand before its name."""
    with path.open(encoding="utf-8", errors="replace") as file:
        parts = [line.split(None, 1) for line in file]
    values = [part[1].strip() for part in parts if len(part) == 2 and part[0].lower() == keyword]
    return [value.split()[-1] if value.startswith("-") else value for value in values]
