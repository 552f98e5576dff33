"""Meshes and clouds by trimesh: .ply, .off, .obj, .stl, .glb. Meshes are sampled."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import Cloud, ReadOptions, damaged, make_cloud
from budwood.points.io.mesh_checks import CHECKS, has_wide_colors


def read_mesh(path: Path, options: ReadOptions) -> Cloud:
    """Read a cloud's points, or sample a mesh's faces by area."""
    trimesh = need("trimesh", f"reading {path.suffix}")
    check = CHECKS.get(path.suffix.lower())
    if check is not None:
        check(path)
    try:
        scene = trimesh.load_scene(path, process=False)
        parts = [_part(geometry) for geometry in scene.dump()]
    except Exception as error:  # trimesh's parsers raise errors of any kind
        raise damaged(path, error) from None
    parts = [part for part in parts if len(part[0])]
    if not parts:
        raise InputError(f"{path} has no points")
    vertices, colors, faces = _joined(parts)
    if path.suffix.lower() == ".ply" and has_wide_colors(path):
        colors = _ply_colors(trimesh, path, colors)
    if len(faces) == 0:
        return make_cloud(vertices, colors, source=str(path), invalid=options.invalid)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError(f"{path} is damaged: a face names a vertex that is not there")
    whole = make_cloud(vertices, colors, source=str(path))  # sampling would spread NaN
    xyz, rgb = sample_surface(whole.xyz, faces, options.n_points, options.seed, whole.rgb)
    return make_cloud(xyz, rgb, source=str(path))


def sample_surface(
    vertices: NDArray[Any],
    faces: NDArray[Any],
    n_points: int,
    seed: int = 0,
    colors: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Draw points evenly from the surface of triangles.

    Args:
        vertices: shape (n_vertices, 3).
        faces: indices of vertices, shape (n_faces, 3).
        n_points: how many.
        seed: the same seed gives the same points.
        colors: per vertex, in [0, 1], shape (n_vertices, 3); interpolated.

    Returns:
        Points and their colours (or None), shape (n_points, 3). If no triangle has an area, all
        count alike: a mesh squeezed into a line is sampled along it.
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
    barycentric = np.stack([1 - u - v, u, v], axis=1)[:, :, None]
    points = (corners[chosen] * barycentric).sum(axis=1)
    if colors is None:
        return points, None
    return points, (colors[faces[chosen]] * barycentric).sum(axis=1).clip(0, 1)


def _part(geometry: Any) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any]]:
    """Vertices, colours and faces of one geometry of a scene."""
    vertices = np.asarray(getattr(geometry, "vertices", np.empty((0, 3))), dtype=np.float64)
    faces = np.asarray(getattr(geometry, "faces", np.empty((0, 3))), dtype=np.int64)
    colors = _colors(geometry, len(vertices))
    if colors is not None:
        usable = colors.shape[:1] == vertices.shape[:1] and colors.shape[1] >= 3
        colors = colors[:, :3] / 255.0 if usable else None
    return vertices, colors, faces.reshape(-1, 3)


def _colors(geometry: Any, n_vertices: int) -> NDArray[Any] | None:
    if hasattr(geometry, "colors"):  # a point cloud
        colors = np.asarray(geometry.colors)
        return colors if colors.ndim == 2 and len(colors) else None
    visual = getattr(geometry, "visual", None)
    if visual is None or not getattr(visual, "defined", False):
        return None
    if visual.kind != "texture":
        return np.asarray(visual.vertex_colors)
    colors = visual.material.to_color(visual.uv)
    if colors is None:
        return None
    # A material without a texture has one colour, shape (4,), for all vertices.
    return np.broadcast_to(colors, (n_vertices, 4)) if np.ndim(colors) == 1 else np.asarray(colors)


def _ply_colors(trimesh: Any, path: Path, cut: NDArray[Any] | None) -> NDArray[Any] | None:
    """Read the colours of a .ply's points in full; trimesh's scenes have them ``cut`` to 8 bits."""
    with path.open("rb") as file:
        content = trimesh.exchange.ply.load_ply(file)
    # A texture comes first, and gives the points another order.
    colors = None if "visual" in content else content.get("vertex_colors")
    return cut if colors is None else colors[:, :3]


def _joined(parts: list[Any]) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any]]:
    starts = itertools.accumulate((len(part[0]) for part in parts[:-1]), initial=0)
    faces = np.concatenate([part[2] + start for part, start in zip(parts, starts)])
    vertices = np.concatenate([part[0] for part in parts])
    if any(part[1] is None for part in parts):
        return vertices, None, faces
    return vertices, np.concatenate([part[1] for part in parts]), faces
