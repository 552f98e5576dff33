"""Meshes: .ply, .obj, .stl, .glb, .gltf and .3mf by trimesh, and .off. Their surface is sampled.

A file without faces, as many .ply are, is a cloud, and its vertices are the points.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import (
    Cloud,
    ReadOptions,
    as_points,
    damaged,
    make_cloud,
    not_finite,
    some_colored,
    unit_colors,
)
from budwood.points.io.fields import colors_of
from budwood.points.io.mesh_checks import CHECKS
from budwood.points.io.mesh_colors import (
    GREY,
    Paint,
    face_paint,
    paint_of,
    vertex_colors,
    vertex_paint,
)
from budwood.points.io.mesh_files import missing_files
from budwood.points.io.off_files import off_mesh
from budwood.points.io.ply_header import plain_names, uncommon_colors
from budwood.points.io.units import SPELLINGS

Array = NDArray[Any]
NEEDS = {".3mf": ("lxml", "networkx")}


def read_mesh(path: Path, options: ReadOptions) -> Cloud:
    """Read a cloud's points, or sample a mesh's faces by area."""
    suffix = path.suffix.lower()
    trimesh = need("trimesh", f"reading {suffix}")
    for package in NEEDS.get(suffix, ()):
        need(package, f"reading {suffix}")
    if suffix in CHECKS:
        CHECKS[suffix](path)
    try:
        scene = _scene(trimesh, path)
        parts = [part for geometry in scene.dump() if (part := _part(geometry)) is not None]
        recolored = _ply_colors(trimesh, path) if suffix == ".ply" else None
    except InputError:
        raise
    except Exception as error:  # trimesh's parsers raise errors of any kind
        raise damaged(path, error) from None
    if not parts:
        raise InputError(f"{path} has no points")
    cloud = _cloud(path, _recolored(parts, recolored), options)
    if units := SPELLINGS.get(str(scene.units)):
        cloud = cloud.assuming(units=units)
    if missing := missing_files(path):
        names = ", ".join(missing[:3])
        cloud = cloud.noting(f"{names} cannot be found, so its colours are not used")
    return cloud


def read_off(path: Path, options: ReadOptions) -> Cloud:
    """Read OFF with the colours of its vertices, or else of its faces."""
    try:
        vertices, faces, of_vertices, of_faces, note = off_mesh(path)
    except InputError:
        raise
    except (OverflowError, ValueError) as error:
        raise damaged(path, error) from None
    if not len(faces):
        cloud = make_cloud(vertices, of_vertices, source=str(path), invalid=options.invalid)
        return cloud.noting(note)
    paint = None if of_faces is None else face_paint(of_faces)
    if of_vertices is not None:
        paint = vertex_paint(of_vertices, faces)
    return _cloud(path, [_Part(vertices, faces, paint=paint)], options).noting(note)


class Draw(NamedTuple):
    """Points on a surface: the face of each, shape (n,), and its place there, shape (n, 3)."""

    faces: NDArray[np.int64]
    weights: Array


def sample_surface(
    vertices: Array, faces: Array, n_points: int, seed: int = 0
) -> tuple[Array, Draw]:
    """Draw points evenly from the surface of triangles.

    Args:
        vertices: shape (n_vertices, 3).
        faces: indices of vertices, shape (n_faces, 3).
        n_points: how many.
        seed: the same seed gives the same points.

    Returns:
        Points, shape (n_points, 3), and the faces they are on with barycentric coordinates. If no
        triangle has an area, all count alike: a mesh squeezed into a line is sampled along it.
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
    barycentric = np.stack([1 - u - v, u, v], axis=1)
    points = (corners[chosen] * barycentric[:, :, None]).sum(axis=1)
    return points, Draw(chosen, barycentric)


@dataclass(frozen=True, eq=False)
class _Part:
    """One geometry of a scene.

    Attributes:
        vertices: shape (n_vertices, 3).
        faces: shape (n_faces, 3).
        colors: of the vertices of a cloud, in [0, 1]; None without colours or with faces.
        paint: of the faces; None without colours.
    """

    vertices: Array
    faces: Array
    colors: Array | None = None
    paint: Paint | None = None


def _part(geometry: Any) -> _Part | None:
    vertices = np.asarray(getattr(geometry, "vertices", ()), dtype=np.float64)
    if not len(vertices):
        return None
    faces = np.asarray(getattr(geometry, "faces", ()), dtype=np.int64).reshape(-1, 3)
    if not len(faces):
        return _Part(vertices, faces, vertex_colors(geometry, len(vertices)))
    return _Part(vertices, faces, paint=paint_of(geometry))


def _cloud(path: Path, parts: list[_Part], options: ReadOptions) -> Cloud:
    vertices = np.concatenate([part.vertices for part in parts])
    surfaces = [part for part in parts if len(part.faces)]
    if not surfaces:
        found = [part.colors for part in parts if part.colors is not None]
        colors = np.concatenate(found) if len(found) == len(parts) else None
        cloud = make_cloud(vertices, colors, source=str(path), invalid=options.invalid)
        return cloud.noting(some_colored(len(found), len(parts), "parts"))
    starts = itertools.accumulate((len(part.vertices) for part in surfaces[:-1]), initial=0)
    vertices = as_points(np.concatenate([part.vertices for part in surfaces]), str(path))
    faces = np.concatenate([part.faces + start for part, start in zip(surfaces, starts)])
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError(f"{path} is damaged: a face names a vertex that is not there")
    n_bad = int((~np.isfinite(vertices).all(axis=1)).sum())
    if n_bad:  # sampling would spread them
        raise not_finite(n_bad, len(vertices), str(path))
    xyz, draw = sample_surface(vertices, faces, options.n_points, options.seed)
    try:
        rgb = _painted(surfaces, draw)
    except Exception as error:  # a truncated picture, for example
        raise damaged(path, error) from None
    return make_cloud(xyz, rgb, source=str(path))


def _painted(surfaces: list[_Part], draw: Draw) -> Array | None:
    """Colours of points on surfaces; grey on those without colours beside others."""
    if all(part.paint is None for part in surfaces):
        return None
    rgb = np.full(draw.weights.shape, GREY)
    start = 0
    for part in surfaces:
        end = start + len(part.faces)
        here = (draw.faces >= start) & (draw.faces < end)
        if part.paint is not None and here.any():
            rgb[here] = part.paint(draw.faces[here] - start, draw.weights[here])
        start = end
    return rgb


def _scene(trimesh: Any, path: Path) -> Any:
    header = plain_names(path) if path.suffix.lower() == ".ply" else None
    if header is None:
        return trimesh.load_scene(path, process=False)
    resolver = trimesh.resolvers.FilePathResolver(str(path))
    return trimesh.load_scene(io.BytesIO(header), file_type="ply", resolver=resolver, process=False)


def _ply_colors(trimesh: Any, path: Path) -> Array | None:
    """Colours of a .ply's vertices that trimesh's scenes lack or cut to 8 bits; None for others."""
    if not uncommon_colors(path):
        return None
    content = plain_names(path) or path.read_bytes()
    loaded = trimesh.exchange.ply.load_ply(io.BytesIO(content), skip_materials=True)
    if "visual" in loaded:  # a texture comes first, and gives the points another order
        return None
    element = loaded["metadata"]["_ply_raw"]["vertex"]
    data = {name: np.asarray(element["data"][name]) for name in element["properties"]}
    colors = colors_of(data, str(path))
    return None if colors is None else unit_colors(colors, np.ones(len(colors), bool), str(path))


def _recolored(parts: list[_Part], colors: Array | None) -> list[_Part]:
    """The only part of a .ply with other colours of its vertices."""
    if colors is None or len(parts) != 1 or len(colors) != len(parts[0].vertices):
        return parts
    (part,) = parts
    if not len(part.faces):
        return [_Part(part.vertices, part.faces, colors)]
    return [_Part(part.vertices, part.faces, paint=vertex_paint(colors, part.faces))]
