"""Headers of .ply files: their elements, and properties by the names that trimesh knows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from budwood.errors import InputError
from budwood.points.io.fields import RGB_NAMES, letters_of, named

# Bytes of the .ply types that take more than one; integers first.
PLY_WHOLE = {
    **dict.fromkeys(("short", "ushort", "int16", "uint16"), 2),
    **dict.fromkeys(("int", "uint", "int32", "uint32"), 4),
}
PLY_BYTES = {
    **PLY_WHOLE,
    **dict.fromkeys(("float", "float32"), 4),
    **dict.fromkeys(("double", "float64"), 8),
}
BYTE = ("uchar", "uint8", "char", "int8")
PLAIN = dict(zip("xyzrgb", ("x", "y", "z", "red", "green", "blue")))
"""Letter of a property → the name that trimesh knows."""


@dataclass
class PlyElement:
    """An element of a .ply header.

    Attributes:
        name: such as ``"vertex"``.
        n_rows: how many the file declares.
        names: of the properties.
        properties: type of each value, or of the length where ``is_list``.
        is_list: whether each property is a list.
    """

    name: str
    n_rows: int
    names: list[str] = field(default_factory=list)
    properties: list[str] = field(default_factory=list)
    is_list: list[bool] = field(default_factory=list)

    def color_types(self) -> list[str]:
        """Types of the properties that are one colour each."""
        found = letters_of(self.names)
        types = dict(zip(self.names, self.properties))
        return [types[found[letter]] for letter in "rgb" if letter in found]


def uncommon_colors(path: Path) -> bool:
    """Whether the vertices have colours that trimesh's scenes lack or cut: not bytes, or packed."""
    with path.open("rb") as file:
        elements = ply_elements(path, ply_header(path, file))
    for element in elements:
        types = element.color_types()
        packed = len(types) < 3 and named(element.names, RGB_NAMES) is not None
        if element.name == "vertex" and (packed or any(kind not in BYTE for kind in types)):
            return True
    return False


def plain_names(path: Path) -> bytes | None:
    """The file with the names of properties that trimesh knows; None if it has them already.

    Others, such as X and diffuse_red, are renamed in the header, unless the plain name is there.
    """
    with path.open("rb") as file:
        vertex = [e for e in ply_elements(path, ply_header(path, file)) if e.name == "vertex"]
        names = vertex[0].names if vertex else []
        found = {name: PLAIN[letter] for letter, name in letters_of(names).items()}
        renamed = {old: new for old, new in found.items() if new not in names}
        if not renamed:
            return None
        file.seek(0)
        header = [next(file)]
        element = b""
        while header[-1].split() != [b"end_header"]:
            line = next(file)
            words = line.split()
            element = words[1] if words[:1] == [b"element"] else element
            name = words[-1].decode("latin-1") if words else ""
            if element == b"vertex" and words[0] == b"property" and name in renamed:
                line = b" ".join([*words[:-1], renamed[name].encode()]) + b"\n"
            header.append(line)
        return b"".join(header) + file.read()


def ply_header(path: Path, file: BinaryIO) -> list[list[str]]:
    """Read the header: the words of each line."""
    header = []
    for line in iter(file.readline, b""):
        header.append(line.decode("latin-1").split())
        if header[-1] == ["end_header"]:
            return header
    raise InputError(f"{path} is truncated or no PLY file: its header does not end")


def ply_elements(path: Path, header: list[list[str]]) -> list[PlyElement]:
    """The elements that a header declares, in their order."""
    elements: list[PlyElement] = []
    for words in header:
        if words[:1] == ["element"]:
            if len(words) != 3 or not re.fullmatch("[0-9]+", words[2]):
                raise InputError(f"{path} is damaged: its header has {' '.join(words)[:60]!r}")
            elements.append(PlyElement(words[1], int(words[2])))
        elif words[:1] == ["property"] and len(words) > 2 and elements:
            is_list = words[1] == "list"
            elements[-1].names.append(words[-1])
            elements[-1].is_list.append(is_list)
            elements[-1].properties.append(words[2] if is_list else words[1])
    return elements
