"""Shapes of road objects: parametric ones of ours, and models (AC3D) of Debian packages.

The packages have too few models of most classes, so a class is a family of shapes here: its parts
are swapped and its measures drawn, in metres, y up, x forward. One draw is one model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import trimesh
from classes import ROAD
from shapes import Shape
from trimesh import creation

Rng = np.random.Generator
Mesh = trimesh.Trimesh

# Class: pattern of the path below the packages' folder. Licences: see recipes/README.md.
PACKAGED = {
    "car": r".*/torcs/cars/[^/]+/(?!.*-lod)[^/]+\.acc?",
    "bus": r".*/Transport/110Bus\.ac",
    "building": r".*/(Residential|Commercial)/.*\.ac",
}


def packaged(folder: Path) -> Iterator[Shape]:
    """AC3D models below a folder whose path is in a class."""
    for path in sorted([*folder.rglob("*.ac"), *folder.rglob("*.acc")]):
        for label, pattern in PACKAGED.items():
            if re.fullmatch(pattern, str(path)):
                vertices, faces = read_ac3d(path)
                if len(faces):
                    id_ = str(path.relative_to(folder))
                    yield Shape(id_, label, ROAD[label], "road-packages", id_, vertices, faces)


def read_ac3d(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (y up) and triangles of an AC3D file: its polygons as fans, lines left out.

    Format: AC3D's file format specification, version b. Objects are moved and turned by ``loc`` and
    ``rot`` of themselves and of the objects that they are in.
    """
    lines = iter(path.read_text(errors="replace").splitlines()[1:])
    vertices: list[np.ndarray] = []
    faces: list[tuple[int, int, int]] = []
    _read_object(lines, np.eye(4), vertices, faces)
    return np.array(vertices).reshape(-1, 3), np.array(faces, dtype=np.int64).reshape(-1, 3)


def _read_object(
    lines: Iterator[str],
    frame: np.ndarray,
    vertices: list[np.ndarray],
    faces: list[tuple[int, int, int]],
) -> None:
    """Read one object with those in it: up to its line ``kids``."""
    frame, start = frame.copy(), len(vertices)
    for line in lines:
        key, *values = line.split() or [""]
        if key == "loc":
            frame[:3, 3] += frame[:3, :3] @ np.array(values[:3], float)
        elif key == "rot":
            frame[:3, :3] = frame[:3, :3] @ np.array(values[:9], float).reshape(3, 3).T
        elif key == "data":
            next(lines)
        elif key == "numvert":
            for _ in range(int(values[0])):
                xyz = np.array(next(lines).split()[:3], float)
                vertices.append(frame[:3, :3] @ xyz + frame[:3, 3])
        elif key == "SURF":
            kind = int(values[0], 16) & 15
        elif key == "refs":
            loop = [int(next(lines).split()[0]) + start for _ in range(int(values[0]))]
            faces += _triangles(loop, kind)
        elif key == "kids":
            for _ in range(int(values[0])):
                _read_object(lines, frame, vertices, faces)
            return


def _triangles(loop: list[int], kind: int) -> list[tuple[int, int, int]]:
    """Triangles of a polygon (kind 0) or a strip (4, in .acc files); none of a line."""
    if kind == 0:
        return [(loop[0], a, b) for a, b in pairwise(loop[1:])]
    return list(zip(loop, loop[1:], loop[2:])) if kind == 4 else []


def parametric(label: str, number: int) -> Shape:
    """The model of a class with this number; the same each time."""
    rng = np.random.default_rng([sorted(MAKERS).index(label), number])
    mesh = trimesh.util.concatenate(MAKERS[label](rng))
    id_ = f"parametric/{label}/{number}"
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    return Shape(id_, label, ROAD[label], "parametric", "the budwood authors", vertices, faces)


def box(size: tuple[float, ...], at: tuple[float, ...]) -> Mesh:
    """A box by its measures along x, y, z and its middle."""
    return creation.box(size, trimesh.transformations.translation_matrix(at))


def rod(start: tuple[float, ...], end: tuple[float, ...], radius: float) -> Mesh:
    """A cylinder between two points."""
    return creation.cylinder(radius, segment=[start, end], sections=12)


def ball(radii: tuple[float, ...], at: tuple[float, ...]) -> Mesh:
    """An ellipsoid."""
    mesh = creation.icosphere(subdivisions=2)
    mesh.apply_scale(radii)
    mesh.apply_translation(at)
    return mesh


def wheels(xs: tuple[float, ...], half_width: float, radius: float, width: float) -> list[Mesh]:
    """Pairs of wheels at some places along x."""
    return [
        rod((x, radius, side * half_width), (x, radius, side * (half_width - width)), radius)
        for x in xs
        for side in (-1, 1)
    ]


def hull(*corners: tuple[float, float, float]) -> Mesh:
    """The convex hull of corners, each with its mirror image in z."""
    both = [c for x, y, z in corners for c in ((x, y, z), (x, y, -z))]
    return trimesh.convex.convex_hull(np.array(both))


def car(rng: Rng) -> list[Mesh]:
    length, width = rng.uniform(3.4, 5.1), rng.uniform(1.55, 2.0)
    height, sill, hood = rng.uniform(1.3, 1.9), rng.uniform(0.2, 0.35), rng.uniform(0.75, 1.1)
    front, back = length / 2, -length / 2
    w, roof = width / 2, width / 2 * rng.uniform(0.7, 0.92)
    nose, tail = rng.uniform(0.6, 0.9) * hood, rng.uniform(0.85, 1.0) * hood
    kind = rng.choice(["sedan", "hatch", "wagon"])
    rear = back + {"sedan": 0.2 * length, "hatch": 0.05 * length, "wagon": 0.01 * length}[kind]
    slope = rng.uniform(0.05, 0.2) * length
    body = hull(
        (front, sill, w), (front, nose, w), (back, sill, w), (back, tail, w), (front * 0.4, hood, w)
    )
    cabin = hull(
        (front * rng.uniform(0.3, 0.6), hood * 0.95, w),
        (rear, tail * 0.95, w),
        (front * rng.uniform(-0.05, 0.25), height, roof),
        (rear + slope * (0.3 if kind == "wagon" else 1), height, roof),
    )
    axle = 0.3 * length
    return [body, cabin, *wheels((-axle, axle), w, rng.uniform(0.28, 0.38), 0.2)]


def truck(rng: Rng) -> list[Mesh]:
    width, cab = rng.uniform(2.0, 2.6), rng.uniform(1.6, 2.4)
    tall, load = rng.uniform(2.2, 3.4), rng.uniform(3.0, 11.0)
    bed, radius = rng.uniform(0.8, 1.2), rng.uniform(0.4, 0.55)
    parts = [box((cab, tall - 0.5, width), (load / 2 + cab / 2 + 0.2, tall / 2 + 0.25, 0))]
    parts.append(box((load, 0.25, width), (0, bed, 0)))
    cargo = rng.choice(["box", "flat", "tank", "open"])
    high = rng.uniform(1.6, 2.8)
    if cargo == "box":
        parts.append(box((load, high, width), (0, bed + high / 2, 0)))
    elif cargo == "tank":
        parts.append(rod((-load / 2, bed + 1, 0), (load / 2, bed + 1, 0), min(width / 2, 1.1)))
    elif cargo == "open":
        parts += [box((load, 0.8, 0.1), (0, bed + 0.4, side * width / 2)) for side in (-1, 1)]
    if rng.random() < 0.4:
        parts.append(box((1.0, 1.2, width * 0.9), (load / 2 + cab + 0.6, 1.1, 0)))
    axles = (-load * 0.4, -load * 0.4 + 1.2, load / 2 + cab * 0.6)
    return parts + wheels(axles, width / 2, radius, 0.3)


def bus(rng: Rng) -> list[Mesh]:
    length, width = rng.uniform(7, 14), rng.uniform(2.3, 2.6)
    height, floor = rng.uniform(2.7, 4.2), rng.uniform(0.3, 0.5)
    lean = rng.uniform(0, 0.5)
    f, b, w = length / 2, -length / 2, width / 2
    body = hull((f, floor, w), (b, floor, w), (f - lean, height, w * 0.95), (b, height, w * 0.95))
    parts = [body, *wheels((-length * 0.28, length * 0.33), w, 0.5, 0.3)]
    if rng.random() < 0.5:
        parts.append(box((length * 0.3, 0.3, width * 0.7), (0, height + 0.15, 0)))
    return parts


def two_wheels(rng: Rng, base: float, radius: float, tyre: float) -> list[Mesh]:
    """Two wheels in line, as rings."""
    rings = []
    for x in (-base / 2, base / 2):
        ring = creation.torus(radius - tyre, tyre, major_sections=20, minor_sections=6)
        ring.apply_translation((x, radius, 0))
        rings.append(ring)
    return rings


def bicycle(rng: Rng) -> list[Mesh]:
    base, radius = rng.uniform(0.9, 1.1), rng.uniform(0.28, 0.36)
    saddle, bar = rng.uniform(0.8, 1.0), rng.uniform(0.9, 1.1)
    crank, seat, head = (-0.08, 0.28, 0), (-0.22, saddle, 0), (base * 0.36, bar - 0.1, 0)
    rear, front, tube = (-base / 2, radius, 0), (base / 2, radius, 0), rng.uniform(0.015, 0.03)
    top = (-0.2, saddle * rng.uniform(0.6, 0.9), 0)
    pairs = [(crank, seat), (crank, head), (top, head), (rear, crank), (rear, top), (front, head)]
    parts = [rod(a, b, tube) for a, b in pairs]
    reach = rng.uniform(0.2, 0.32)
    parts.append(rod((head[0], bar, -reach), (head[0], bar, reach), 0.02))
    parts.append(rod(head, (head[0], bar, 0), 0.02))
    parts.append(box((0.26, 0.06, 0.14), (-0.22, saddle + 0.03, 0)))
    return parts + two_wheels(rng, base, radius, rng.uniform(0.015, 0.03))


def motorcycle(rng: Rng) -> list[Mesh]:
    base, radius = rng.uniform(1.2, 1.6), rng.uniform(0.26, 0.34)
    seat, bar = rng.uniform(0.7, 0.9), rng.uniform(0.95, 1.15)
    parts = two_wheels(rng, base, radius, rng.uniform(0.05, 0.08))
    parts.append(box((base * 0.4, 0.35, rng.uniform(0.25, 0.4)), (0, 0.42, 0)))
    parts.append(ball((0.3, 0.17, 0.16), (0.15, seat + 0.08, 0)))
    parts.append(box((rng.uniform(0.5, 0.8), 0.12, 0.28), (-0.35, seat, 0)))
    parts.append(rod((base / 2, radius, 0), (base * 0.3, bar, 0), 0.05))
    parts.append(rod((base * 0.3, bar, -0.38), (base * 0.3, bar, 0.38), 0.025))
    if rng.random() < 0.5:  # a scooter's shield, or a fairing
        parts.append(box((0.1, rng.uniform(0.4, 0.7), 0.4), (base * 0.36, 0.75, 0)))
    return parts


def body(rng: Rng, hip: float, lean: float, at: float = 0.0) -> tuple[list[Mesh], tuple, float]:
    """Torso and head on hips of a height; also the shoulders' place, and a person's size."""
    size, stout = rng.uniform(0.85, 1.12), rng.uniform(0.8, 1.4)
    top = (at + 0.55 * size * np.sin(lean), hip + 0.55 * size * np.cos(lean), 0.0)
    torso = creation.capsule(0.5 * size, 0.15 * size, count=[8, 8])
    torso.apply_scale((0.8 * stout, 1.15 * stout, 1))
    torso.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0)))
    torso.apply_transform(trimesh.transformations.rotation_matrix(-lean, (0, 0, 1)))
    torso.apply_translation((at, hip, 0))
    head = (top[0] + 0.1 * np.sin(lean), top[1] + 0.22 * size, 0.0)
    return [torso, ball((0.1, 0.13, 0.09), head)], top, size


def limb(points: list[tuple], radius: float) -> list[Mesh]:
    """Rods along points."""
    return [rod(a, b, radius) for a, b in pairwise(points)]


def pedestrian(rng: Rng) -> list[Mesh]:
    hip = rng.uniform(0.7, 0.95)
    stride = rng.uniform(0.2, 0.6) if rng.random() < 0.5 else rng.uniform(0, 0.06)
    parts, shoulder, size = body(rng, hip, rng.uniform(-0.05, 0.15))
    for side in (-1, 1):
        z, foot = side * 0.1 * size, side * stride / 2
        knee = (foot * 0.5 + stride * 0.15, hip * 0.5, z)
        parts += limb([(0, hip, z), knee, (foot, 0.05, z)], 0.07 * size)
        parts.append(box((0.26, 0.08, 0.1), (foot + 0.06, 0.04, z)))
        hand = rng.uniform(-0.1, 0.2) - side * stride * 0.5
        arm = side * rng.uniform(0.2, 0.3)
        elbow = (shoulder[0] + hand * 0.3, shoulder[1] - 0.28 * size, arm)
        end = (shoulder[0] + hand, shoulder[1] - 0.52 * size, arm)
        parts += limb([(shoulder[0], shoulder[1], side * 0.2 * size), elbow, end], 0.045 * size)
    if rng.random() < 0.25:
        parts.append(box((0.18, 0.45, 0.3), (-0.22, hip + 0.35, 0)))  # a backpack
    if rng.random() < 0.15:
        parts.append(
            hull((0.3, 0.3, 0.3), (-0.3, 0.3, 0.3), (0.12, hip + 0.2, 0.16), (0, hip, 0.1))
        )
    return parts


def cyclist(rng: Rng) -> list[Mesh]:
    parts = bicycle(rng)
    rider, shoulder, size = body(rng, 0.98, rng.uniform(0.2, 0.9), -0.22)
    for side in (-1, 1):
        up = side * rng.uniform(0.05, 0.16)
        hip, knee = (-0.22, 0.98, side * 0.1), (0.15, 0.72 + up, side * 0.12)
        rider += limb([hip, knee, (-0.05, 0.3 + up, side * 0.12)], 0.07 * size)
        grip = (0.36, 1.02, side * 0.25)
        rider += limb([(shoulder[0], shoulder[1], side * 0.2), grip], 0.045 * size)
    return parts + rider


def traffic_sign(rng: Rng) -> list[Mesh]:
    high, size = rng.uniform(1.8, 3.2), rng.uniform(0.25, 0.5)
    shape = rng.choice(["disc", "triangle", "octagon", "square", "wide"])
    if shape in ("square", "wide"):
        plate = box((0.03, 2 * size, 2 * size * (1 if shape == "square" else 1.8)), (0.05, high, 0))
    else:
        sides = {"disc": 24, "triangle": 3, "octagon": 8}[shape]
        plate = creation.cylinder(size, 0.03, sections=sides)
        plate.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, (0, 1, 0)))
        plate.apply_translation((0.05, high, 0))
    posts = (0,) if shape != "wide" else (-size, size)
    radius = rng.uniform(0.025, 0.06)
    return [plate, *(rod((0, 0, z), (0, high + size * 0.8, z), radius) for z in posts)]


def traffic_cone(rng: Rng) -> list[Mesh]:
    high, radius = rng.uniform(0.3, 1.0), rng.uniform(0.12, 0.25)
    profile = [(0, high), (radius * rng.uniform(0.1, 0.3), high), (radius, 0.04), (0, 0.04)]
    cone = creation.revolve(np.array(profile[::-1]), sections=20)
    cone.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0)))
    foot = radius * rng.uniform(1.1, 1.4)
    return [cone, box((2 * foot, 0.04, 2 * foot), (0, 0.02, 0))]


def barrier(rng: Rng) -> list[Mesh]:
    length, high = rng.uniform(1.5, 5), rng.uniform(0.7, 1.1)
    kind = rng.choice(["concrete", "rail", "boards"])
    if kind == "concrete":
        half = length / 2
        return [
            hull((half, 0, 0.3), (-half, 0, 0.3), (half, 0.25, 0.27), (-half, 0.25, 0.27)),
            hull((half, 0.2, 0.2), (-half, 0.2, 0.2), (half, high, 0.09), (-half, high, 0.09)),
        ]
    posts = np.linspace(-length / 2, length / 2, rng.integers(2, 5))
    parts = [box((0.1, high, 0.1), (x, high / 2, 0)) for x in posts]
    rows = (0.65,) if kind == "rail" else (0.35, 0.9)
    parts += [box((length, rng.uniform(0.15, 0.3), 0.05), (0, high * r, 0.06)) for r in rows]
    if kind == "boards":
        parts += [box((0.08, 0.05, 0.7), (x, 0.03, 0)) for x in posts]
    return parts


def pole(rng: Rng) -> list[Mesh]:
    high, radius = rng.uniform(2.5, 9), rng.uniform(0.05, 0.18)
    parts = [rod((0, 0, 0), (0, high, 0), radius)]
    kind = rng.choice(["bare", "arm", "cross"])
    if kind == "arm":
        reach = rng.uniform(0.5, 2)
        parts += [rod((0, high, 0), (reach, high + 0.2, 0), 0.04)]
        parts += [box((0.6, 0.12, 0.25), (reach, high + 0.2, 0))]
    elif kind == "cross":
        parts += [box((0.1, 0.1, rng.uniform(1, 2.4)), (0, high * 0.93, 0))]
    return parts


def tree(rng: Rng) -> list[Mesh]:
    high, trunk = rng.uniform(2.5, 12), rng.uniform(0.06, 0.3)
    first = high * rng.uniform(0.15, 0.45)
    parts = [rod((0, 0, 0), (rng.normal(0, 0.1), high * 0.8, rng.normal(0, 0.1)), trunk)]
    wide = high * rng.uniform(0.15, 0.4)
    if rng.random() < 0.3:  # a conifer
        n = int(rng.integers(2, 6))
        for i, y in enumerate(np.linspace(first, high * 0.8, n)):
            cone = creation.cone(wide * (1 - i / (n + 1)), high * 0.35, sections=14)
            cone.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0)))
            cone.apply_translation((0, y, 0))
            parts.append(cone)
        return parts
    for _ in range(rng.integers(4, 14)):
        angle, out = rng.uniform(0, 2 * np.pi), wide * rng.uniform(0.1, 0.8)
        at = (out * np.cos(angle), rng.uniform(first, high), out * np.sin(angle))
        crown = ball(tuple(wide * rng.uniform(0.25, 0.6, 3)), at)
        crown.vertices += rng.normal(0, 0.06 * wide, crown.vertices.shape)
        parts += [crown, rod((0, first, 0), at, trunk * 0.4)]
    return parts


def building(rng: Rng) -> list[Mesh]:
    length, width = rng.uniform(6, 25), rng.uniform(5, 14)
    high = rng.uniform(2.8, 18)
    parts = [box((length, high, width), (0, high / 2, 0))]
    if rng.random() < 0.6:
        ridge, w = high + rng.uniform(1, 4), width / 2 * rng.uniform(1, 1.1)
        inset = rng.uniform(0, 0.3) * length
        ends = ((length / 2, high, w), (-length / 2, high, w))
        parts.append(hull(*ends, (length / 2 - inset, ridge, 0), (inset - length / 2, ridge, 0)))
    if rng.random() < 0.5:
        wing = rng.uniform(0.3, 0.8)
        side = (width * wing, high * wing, length * 0.3)
        parts.append(box(side, (length * 0.3, side[1] / 2, width / 2 + side[2] / 2)))
    return parts


def animal(rng: Rng) -> list[Mesh]:
    size = rng.uniform(0.3, 1.5)
    long, deep, leg = size * rng.uniform(0.9, 1.4), size * rng.uniform(0.2, 0.35), size * 0.5
    trunk = ball((long / 2, deep, deep * 0.8), (0, leg + deep, 0))
    head = (long * 0.65, leg + 2 * deep + size * rng.uniform(-0.1, 0.5), 0)
    parts = [trunk, rod((long * 0.4, leg + deep * 1.3, 0), head, deep * 0.45)]
    parts.append(ball((size * 0.2, size * 0.11, size * 0.1), (head[0] + size * 0.1, *head[1:])))
    for x in (-long * 0.35, long * 0.35):
        for z in (-deep * 0.5, deep * 0.5):
            foot = x + rng.normal(0, 0.1 * size)
            parts.append(rod((x, leg + deep * 0.6, z), (foot, 0, z), size * 0.06))
    tail = (-long * 0.5 - size * 0.2, leg + deep * rng.uniform(0, 2.5), 0)
    return [*parts, rod((-long * 0.48, leg + deep, 0), tail, size * 0.03)]


MAKERS: dict[str, Callable[[Rng], list[Mesh]]] = {
    "car": car,
    "truck": truck,
    "bus": bus,
    "motorcycle": motorcycle,
    "bicycle": bicycle,
    "cyclist": cyclist,
    "pedestrian": pedestrian,
    "traffic sign": traffic_sign,
    "traffic cone": traffic_cone,
    "barrier": barrier,
    "pole": pole,
    "tree": tree,
    "building": building,
    "animal": animal,
}
