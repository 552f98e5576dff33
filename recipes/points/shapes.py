"""Read the models of the two packages as triangles: furniture (OBJ in .sh3f), parts (VRML)."""

from __future__ import annotations

import fnmatch
import io
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import trimesh
from classes import FURNITURE, OTHER, PARTS

FREE = "CC-BY-SA-4.0-with-exception"
PER_CLASS = 40


@dataclass(frozen=True)
class Shape:
    """A 3D model.

    Attributes:
        id: its place in the package.
        label: its class.
        group: seen, unseen, novel or other.
        package: furniture or parts.
        creator: its author, for NOTICE.
        vertices: y is up, shape (n_vertices, 3).
        faces: shape (n_faces, 3).
    """

    id: str
    label: str
    group: str
    package: str
    creator: str
    vertices: np.ndarray
    faces: np.ndarray


def furniture(folder: Path) -> Iterator[Shape]:
    """Models of the catalogues (.sh3f) below a folder."""
    for archive in sorted(folder.rglob("*.sh3f")):
        with zipfile.ZipFile(archive) as files:
            text = files.read("PluginFurnitureCatalog.properties").decode("latin-1")
            for about in _entries(text):
                found = _furniture_class(about["name"])
                mesh = trimesh.load(
                    io.BytesIO(files.read(about["model"].lstrip("/"))),
                    file_type="obj",
                    force="mesh",
                    process=False,
                    skip_materials=True,
                )
                vertices = np.asarray(mesh.vertices, dtype=np.float64)
                if "modelRotation" in about:
                    turn = np.array(about["modelRotation"].split(), dtype=np.float64)
                    vertices = vertices @ turn.reshape(3, 3).T
                id_ = f"{archive.stem}/{about['id']}"
                creator = f"{about.get('creator', 'unknown')} ({archive.stem})"
                faces = np.asarray(mesh.faces, dtype=np.int64)
                yield Shape(id_, *found, "furniture", creator, vertices, faces)


def parts(folder: Path) -> Iterator[Shape]:
    """Models (.wrl) below a folder whose name is in a class and whose licence is `FREE`.

    Of each class at most `PER_CLASS`, evenly spread over the sorted names: neighbours differ by a
    pin or two.
    """
    licences = _licences(next(folder.rglob("copyright")))
    named = defaultdict(list)
    for path in sorted(folder.rglob("*.wrl")):
        relative = f"{path.parent.name}/{path.name}"
        key = relative.replace(".3dshapes", "").removesuffix(".wrl")
        for label, (_, pattern) in PARTS.items():
            if re.match(pattern, key) and _licence_of(relative, licences) == FREE:
                named[label].append((key, path))
                break
    for label, found in named.items():
        chosen = np.linspace(0, len(found) - 1, min(PER_CLASS, len(found))).round().astype(int)
        for key, path in (found[i] for i in chosen):
            triangles = read_vrml(path)
            if triangles is not None:
                group = PARTS[label][0]
                yield Shape(key, label, group, "parts", "KiCad Community", *triangles)


def read_vrml(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Vertices (y up) and triangles of a flat list of indexed face sets; None for anything else."""
    text = path.read_text(errors="replace")
    if "Transform" in text:
        return None
    vertices, faces, start = [], [], 0
    for block in text.split("IndexedFaceSet")[1:]:
        points = re.search(r"point\s*\[([^\]]*)\]", block)
        index = re.search(r"coordIndex\s*\[([^\]]*)\]", block)
        if points is None or index is None:
            return None
        corners = np.array(points[1].replace(",", " ").split(), dtype=np.float64).reshape(-1, 3)
        polygon: list[int] = []
        for number in map(int, index[1].replace(",", " ").split()):
            if number >= 0:
                polygon.append(number + start)
                continue
            faces += [(polygon[0], b, c) for b, c in pairwise(polygon[1:])]
            polygon = []
        vertices.append(corners)
        start += len(corners)
    if not faces:
        return None
    x, y, z = np.concatenate(vertices).T
    return np.stack([x, z, -y], axis=1), np.array(faces)


def _entries(text: str) -> Iterator[dict[str, str]]:
    entries: dict[int, dict[str, str]] = defaultdict(dict)
    for line in text.splitlines():
        if match := re.match(r"(\w+)#(\d+)\s*=\s*(.*)", line):
            entries[int(match[2])][match[1]] = _unescaped(match[3].strip())
    yield from entries.values()


def _unescaped(text: str) -> str:
    r"""Put in the characters that .properties files write as ``\u20ac``."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), text)


def _furniture_class(name: str) -> tuple[str, str]:
    for label, (group, pattern) in FURNITURE.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return label, group
    return name.lower().replace(", ", " and "), OTHER  # commas separate labels


def _licences(copyright_file: Path) -> list[tuple[str, str]]:
    """Pattern and licence, in the order of the file."""
    found = []
    for part in copyright_file.read_text().split("\n\n"):
        files = re.search(r"^Files:((?: .*\n)+)", part + "\n", re.MULTILINE)
        licence = re.search(r"^License: *(\S+)", part, re.MULTILINE)
        if files and licence:
            found += [(pattern, licence[1]) for pattern in files[1].split()]
    return found


def _licence_of(name: str, licences: list[tuple[str, str]]) -> str:
    """The last pattern that matches counts, as Debian's format says."""
    return [licence for pattern, licence in licences if fnmatch.fnmatchcase(name, pattern)][-1]
