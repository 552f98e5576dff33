"""Meshes and clouds by trimesh: .ply, .off, .obj, .stl, .glb. Meshes are sampled."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.points.io.cloud import Cloud, make_cloud
from budwood.points.io.options import ReadOptions
from budwood.points.io.scans import damaged, need


def read_mesh(path: Path, options: ReadOptions) -> Cloud:
    """Any of the formats above; points as they are, faces sampled by area with the seed."""
    trimesh = need("trimesh", f"reading {path.suffix}")
    check = _CHECKS.get(path.suffix.lower())
    if check is not None:
        check(path)
    try:
        scene = trimesh.load_scene(path, process=False)
        parts = [_part(geometry) for geometry in scene.dump()]
    except Exception as error:  # trimesh raises what its parsers happen to
        raise damaged(path, error) from None
    parts = [part for part in parts if len(part[0])]
    if not parts:
        raise InputError(f"{path} has no points")
    n_found, n_declared = sum(len(part[0]) for part in parts), _declared(path)
    if n_found < n_declared:
        raise InputError(f"{path} is truncated: {n_found} of {n_declared} vertices")
    vertices, colors, faces = _joined(parts)
    if len(faces) == 0:
        return make_cloud(vertices, colors, source=str(path), invalid=options.invalid)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError(f"{path} is damaged: a face names a vertex that is not there")
    make_cloud(vertices, source=str(path))  # sampling would spread NaN over whole triangles
    xyz, rgb = sample_surface(vertices, faces, options.n_points, options.seed, colors)
    return make_cloud(xyz, rgb, source=str(path))


def sample_surface(
    vertices: NDArray[Any],
    faces: NDArray[Any],
    n_points: int,
    seed: int = 0,
    colors: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Points spread evenly over triangles.

    Args:
        vertices: shape (n_vertices, 3).
        faces: indices of vertices, shape (n_faces, 3).
        n_points: how many.
        seed: the same seed gives the same points.
        colors: per vertex, in [0, 1], shape (n_vertices, 3); interpolated.

    Returns:
        Points and their colours (or None), shape (n_points, 3). Triangles without any area count
        alike if no other has one: a mesh squeezed into a line is sampled along it.
    """
    rng = np.random.default_rng(seed)
    corners = vertices[faces]  # (n_faces, 3, 3)
    edges = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    total = areas.sum()
    weights = areas / total if total > 0 else np.full(len(faces), 1 / len(faces))
    chosen = rng.choice(len(faces), size=n_points, p=weights)
    u, v = rng.random((2, n_points))
    over = u + v > 1  # the other half of the parallelogram folds back onto the triangle
    u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
    shares = np.stack([1 - u - v, u, v], axis=1)[:, :, None]
    points = (corners[chosen] * shares).sum(axis=1)
    if colors is None:
        return points, None
    return points, (colors[faces[chosen]] * shares).sum(axis=1).clip(0, 1)


def _part(geometry: Any) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any]]:
    """Vertices, colours and faces of one geometry of a scene."""
    vertices = np.asarray(getattr(geometry, "vertices", np.empty((0, 3))), dtype=np.float64)
    faces = np.asarray(getattr(geometry, "faces", np.empty((0, 3))), dtype=np.int64)
    colors = _colors(geometry)
    if colors is not None:
        usable = colors.shape[:1] == vertices.shape[:1] and colors.shape[1] >= 3
        colors = colors[:, :3] / 255.0 if usable else None
    return vertices, colors, faces.reshape(-1, 3)


def _colors(geometry: Any) -> NDArray[Any] | None:
    if hasattr(geometry, "colors"):  # a point cloud
        colors = np.asarray(geometry.colors)
        return colors if colors.ndim == 2 and len(colors) else None
    visual = getattr(geometry, "visual", None)
    if visual is None or not getattr(visual, "defined", False):
        return None
    if visual.kind == "texture":
        visual = visual.to_color()
    return np.asarray(visual.vertex_colors)


def _joined(parts: list[Any]) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any]]:
    starts = itertools.accumulate((len(part[0]) for part in parts[:-1]), initial=0)
    faces = np.concatenate([part[2] + start for part, start in zip(parts, starts)])
    vertices = np.concatenate([part[0] for part in parts])
    if any(part[1] is None for part in parts):
        return vertices, None, faces
    return vertices, np.concatenate([part[1] for part in parts]), faces


# Files that trimesh reads in part without a word. What each format declares is checked first. ----


def _check_stl(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(84)
        if head[:5].lower() == b"solid" and b"\0" not in head:
            file.seek(max(0, size - 256))
            if b"endsolid" not in file.read().lower():
                raise InputError(f"{path} is truncated: its solid does not end")
            return
    if len(head) < 84:
        raise InputError(f"{path} is truncated: {size} bytes are no STL")
    n_faces = struct.unpack("<I", head[80:])[0]
    if size < 84 + 50 * n_faces:
        raise InputError(f"{path} is truncated: {(size - 84) // 50} of {n_faces} faces")


def _check_glb(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(12)
    if len(head) < 12 or head[:4] != b"glTF":
        raise InputError(f"{path} is no GLB file")
    declared = struct.unpack("<I", head[8:])[0]
    if path.stat().st_size < declared:
        raise InputError(f"{path} is truncated: {path.stat().st_size} of {declared} bytes")


def _check_obj(path: Path) -> None:
    """A last line that is cut within a record; what is cut between records cannot be told."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 4096))
        tail = file.read().decode("utf-8", errors="replace")
    if tail.endswith("\n") or not tail:
        return
    fields = tail.splitlines()[-1].split()
    if fields and fields[0] in ("v", "f") and len(fields) < 4:
        raise InputError(f"{path} is truncated: its last line is {' '.join(fields)!r}")


def _check_off(path: Path) -> None:
    with path.open("rb") as file:
        rows = [row for line in file if (row := line.split(b"#")[0].split())]
    counts = rows[0][-3:] if rows and len(rows[0]) > 3 else rows[1] if len(rows) > 1 else []
    if len(counts) < 2 or not all(count.isdigit() for count in counts):
        raise InputError(f"{path} is truncated or no OFF file: it declares no counts")
    start = 1 if len(rows[0]) > 3 else 2
    wanted = int(counts[0]) + int(counts[1])
    if len(rows) - start < wanted:
        raise InputError(f"{path} is truncated: {len(rows) - start} of {wanted} rows")


def _declared(path: Path) -> int:
    """Vertices that the header of a .ply declares, 0 for other formats."""
    if path.suffix.lower() != ".ply":
        return 0
    with path.open("rb") as file:
        lines = [line.split() for line in itertools.islice(file, 200)]
    rows = [line for line in lines if line[:2] == [b"element", b"vertex"] and len(line) == 3]
    return int(rows[0][2]) if rows and rows[0][2].isdigit() else 0


_CHECKS = {".stl": _check_stl, ".off": _check_off, ".glb": _check_glb, ".obj": _check_obj}
