"""Meshes in OFF with their colours, which trimesh leaves out, and with faces of any size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.points.io.cloud import unit_colors
from budwood.points.io.mesh_colors import GREY

Array = NDArray[Any]
UNUSED = "its rows have further values that are no colours, and these are not used"


class OffMesh(NamedTuple):
    """What an OFF file holds.

    Attributes:
        vertices: shape (n_vertices, 3).
        faces: triangles, into which faces with more corners are cut, shape (n_faces, 3).
        vertex_colors: in [0, 1], shape (n_vertices, 3); None without colours.
        face_colors: of the triangles, shape (n_faces, 3); likewise.
        note: of values that are not used; None if there are none.
    """

    vertices: Array
    faces: NDArray[np.int64]
    vertex_colors: Array | None
    face_colors: Array | None
    note: str | None = None


def off_mesh(path: Path) -> OffMesh:
    """Read an OFF file: a row for each vertex and each face, with colours at the end.

    Colours are whole numbers up to 255 or 65,535, or numbers up to 1. A number of a colour map is
    no colour. Vertices of a plain ``OFF`` (colours make it ``COFF``) have them if they are whole
    numbers above 1: others may be normals.

    Raises:
        InputError: it is no OFF file, or has fewer rows than it declares.
        OverflowError: a row is damaged.
        ValueError: likewise.
    """
    kind, vertices, faces = _rows(path)
    start = 6 if "N" in kind else 3
    of_vertices, rest = _colors([row[start:] for row in vertices])
    if of_vertices is not None and "C" not in kind and not _are_bytes(vertices, start):
        of_vertices, rest = None, True
    corners = [_corners(path, row) for row in faces]
    fans = [[(face[0], *edge) for edge in itertools.pairwise(face[1:])] for face in corners]
    of_faces, more = _colors([row[len(face) + 1 :] for row, face in zip(faces, corners)])
    return OffMesh(
        np.array([row[:3] for row in vertices]).astype(np.float64).reshape(len(vertices), 3),
        np.array(list(itertools.chain.from_iterable(fans)), dtype=np.int64).reshape(-1, 3),
        of_vertices,
        None if of_faces is None else of_faces.repeat([len(fan) for fan in fans], axis=0),
        UNUSED if rest or more else None,
    )


def _rows(path: Path) -> tuple[str, list[list[bytes]], list[list[bytes]]]:
    """Letters before OFF, such as N with normals, and the words of each vertex and each face.

    The counts may be on the line of ``OFF``, as in ModelNet40.
    """
    with path.open("rb") as file:
        rows = [row for line in file if (row := line.split(b"#")[0].strip())]
    kind, keyword, rest = rows[0].partition(b"OFF") if rows else (b"", b"", b"")
    if not keyword:
        raise InputError(f"{path} is not an OFF file: it does not begin with OFF")
    body = ([rest] if rest else []) + rows[1:]
    counts = body[0].split() if body else []
    if len(counts) < 2 or not all(count.isdigit() for count in counts):
        raise InputError(f"{path} is truncated or no OFF file: it declares no counts")
    n_rows, n_vertices, n_faces = len(body) - 1, int(counts[0]), int(counts[1])
    if n_rows < n_vertices + n_faces:
        raise InputError(f"{path} is truncated: {n_rows} of {n_vertices + n_faces} rows")
    words = [row.split() for row in body[1 : n_vertices + n_faces + 1]]
    return kind.decode("latin-1"), words[:n_vertices], words[n_vertices:]


def _corners(path: Path, row: list[bytes]) -> list[int]:
    """The vertices of a face, whose number stands before them."""
    n_corners = int(row[0])
    corners = [int(word) for word in row[1 : n_corners + 1]]
    if len(corners) != n_corners:
        raise InputError(
            f"{path} is truncated or damaged: a face has {len(corners)} of {n_corners} corners"
        )
    return corners


def _colors(words: Sequence[Sequence[bytes]]) -> tuple[Array | None, bool]:
    """Colours by their words, grey where a row has fewer than three; None if there are none.

    Returns:
        In [0, 1], shape (n_rows, 3), or None; and whether there are words that are no colours.
    """
    has_color = np.array([len(color) >= 3 for color in words], dtype=bool)
    if not has_color.any():
        return None, False
    colors = np.full((len(words), 3), GREY)
    try:
        values = np.array([color[:3] for color in words if len(color) >= 3]).astype(np.float64)
        colors[has_color] = unit_colors(values, np.ones(len(values), dtype=bool), "")
    except ValueError:  # words, normals, or values of something else
        return None, True
    return colors, False


def _are_bytes(rows: Sequence[Sequence[bytes]], start: int) -> bool:
    """Whether the values of rows from a place on are whole numbers, some of them above 1."""
    values = [word for row in rows for word in row[start : start + 3]]
    return all(word.isdigit() for word in values) and any(int(word) > 1 for word in values)
