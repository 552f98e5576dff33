"""Colours of meshes at points on their faces: by vertex, by face, by material or by texture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Paint = Callable[[Array, Array], Array]
"""Colours in [0, 1] at points on faces, shape (n_points, 3), by the numbers of their faces, shape
(n_points,), and their barycentric coordinates, shape (n_points, 3)."""

GREY = 0.4
"""Of parts without a colour beside parts that have one; the encoders' own grey."""


def paint_of(mesh: Any) -> Paint | None:
    """How a mesh of trimesh is coloured; None if it is not."""
    visual = getattr(mesh, "visual", None)
    if visual is None or not getattr(visual, "defined", False):
        return None
    if visual.kind == "face":
        return face_paint(_unit(visual.face_colors))
    if visual.kind == "vertex":
        return vertex_paint(_unit(visual.vertex_colors), np.asarray(mesh.faces))
    return _material_paint(visual, np.asarray(mesh.faces))


def vertex_paint(colors: Array, faces: Array) -> Paint:
    """Interpolate colours of vertices.

    Args:
        colors: in [0, 1], shape (n_vertices, 3).
        faces: vertices of each, shape (n_faces, 3).
    """
    return lambda chosen, weights: _between(colors, faces[chosen], weights).clip(0, 1)


def face_paint(colors: Array) -> Paint:
    """Colour each face alike.

    Args:
        colors: in [0, 1], shape (n_faces, 3).
    """
    return lambda chosen, weights: colors[chosen]


def vertex_colors(geometry: Any, n_vertices: int) -> Array | None:
    """Colours of the vertices of a geometry without faces, in [0, 1]; None without colours."""
    colors = getattr(geometry, "colors", None)
    visual = getattr(geometry, "visual", None)
    if colors is None and visual is not None and visual.kind == "vertex":
        colors = visual.vertex_colors
    if colors is None or np.ndim(colors) != 2 or np.shape(colors)[0] != n_vertices:
        return None
    return _unit(colors) if np.shape(colors)[1] >= 3 else None


def _material_paint(visual: Any, faces: Array) -> Paint | None:
    material, uv = visual.material, visual.uv
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    if image is not None and uv is not None:
        factor = getattr(material, "baseColorFactor", None)
        tint = 1.0 if factor is None else _unit(factor)
        return lambda chosen, weights: (
            tint * _unit(material.to_color(_between(uv, faces[chosen], weights)))
        )
    factor = getattr(material, "baseColorFactor", None)
    factor = factor if factor is not None else getattr(material, "diffuse", None)
    if factor is None:
        return None
    color = _unit(factor)
    return lambda chosen, weights: np.broadcast_to(color, (len(chosen), 3))


def _between(values: Array, corners: Array, weights: Array) -> Array:
    """Interpolate values of the corners of triangles, at barycentric coordinates."""
    return (np.asarray(values)[corners] * weights[:, :, None]).sum(axis=1)


def _unit(colors: Any) -> Array:
    """The first three columns of colours in 8 bits, in [0, 1]."""
    return np.asarray(colors)[..., :3] / 255.0
