"""How well `scan` names the objects of simulated frames (docs/scan.md).

    python benchmarks/scan_street.py --frames 40 --out benchmarks/results/scan-street.json

A frame is flat ground with objects on it, 5 to 40 m away, as one turn of a LiDAR sees them. The
objects are draws of recipes/points/road_shapes.py that no training and no test has. Trees and poles
are not among the labels and should come out as unknown.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from budwood import records
from budwood.points import scan
from budwood.points.io.meshes import sample_surface
from budwood.points.scanning.boxes import UNKNOWN, Box

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes/points"))
from road_shapes import parametric

Array = NDArray[np.float64]

LABELS = (
    *("car", "truck", "bus", "pedestrian", "cyclist", "bicycle", "motorcycle"),
    *("traffic cone", "traffic sign", "barrier"),
)
OTHERS = ("tree", "pole")
CHANCES = {"car": 3, "pedestrian": 3, "cyclist": 2}  # all other kinds: 1
FIRST = 10_000  # number of the first model; the recipe has those below 120
HEIGHT = 1.73  # of the sensor above the ground, metres
DOWN, UP = -24.9, 2.0  # degrees, the beams of a Velodyne HDL-64E
NEAREST, FARTHEST, APART = 5.0, 40.0, 9.0  # metres
NOISE = 0.01  # along each ray, metres
DENSE = 40_000  # points on a model before the LiDAR sees it
FEWEST = 10  # points of an object that counts; `scan` leaves out smaller clusters
RANGES = ((512, None), (128, 511), (64, 127), (32, 63), (FEWEST, 31))


@dataclass(frozen=True)
class Standing:
    """An object of a frame: its kind, its place, and how many points the LiDAR has of it."""

    kind: str
    place: Array
    n_points: int


def frame(seed: int, n_objects: int, beams: int, shots: int) -> tuple[Array, list[Standing]]:
    """Points in the sensor's frame, z up, shape (n, 3), and the objects."""
    rng = np.random.default_rng(seed)
    kinds = [*LABELS, *OTHERS]
    chance = np.array([CHANCES.get(kind, 1) for kind in kinds], dtype=float)
    places = list(free_places(rng, n_objects))
    drawn = rng.choice(kinds, len(places), p=chance / chance.sum()).tolist()
    models = [standing(kind, place, rng) for kind, place in zip(drawn, places)]
    owner = np.repeat(np.arange(len(models)), DENSE)
    seen, open_rays = swept(np.concatenate(models), beams, shots)
    counts = np.bincount(owner[seen], minlength=len(models)).tolist()
    ground = open_rays[open_rays[:, 2] < 0]
    ground = ground * (HEIGHT / -ground[:, 2:])
    ground = ground[np.linalg.norm(ground, axis=1) < 2 * FARTHEST]
    xyz = np.concatenate([np.concatenate(models)[seen], ground])
    length = np.linalg.norm(xyz, axis=1, keepdims=True)
    xyz *= 1 + rng.normal(0, NOISE, length.shape) / length
    return xyz, [Standing(*one) for one in zip(drawn, places, counts)]


def free_places(rng: np.random.Generator, n: int) -> Iterator[Array]:
    """Up to n places on the ground, far enough from one another."""
    taken: list[Array] = []
    for _ in range(50 * n):
        distance, angle = rng.uniform(NEAREST, FARTHEST), rng.uniform(0, 2 * math.pi)
        place = distance * np.array([math.cos(angle), math.sin(angle)])
        if len(taken) < n and all(np.linalg.norm(place - other) > APART for other in taken):
            taken.append(place)
            yield place


def standing(kind: str, place: Array, rng: np.random.Generator) -> Array:
    """Points on a model that stands at a place, turned by any angle, shape (DENSE, 3)."""
    shape = parametric(kind, FIRST + int(rng.integers(10_000)))
    xyz, _ = sample_surface(shape.vertices, shape.faces, DENSE, int(rng.integers(1 << 31)))
    x, y, z = xyz[:, 0], -xyz[:, 2], xyz[:, 1] - xyz[:, 1].min()
    angle = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(angle), math.sin(angle)
    return np.stack([c * x - s * y + place[0], s * x + c * y + place[1], z - HEIGHT], axis=1)


def swept(xyz: Array, beams: int, shots: int) -> tuple[NDArray[np.int64], Array]:
    """Indices of the points that a turn of the LiDAR hits first, and directions that hit none.

    Each ray takes the nearest point within a quarter of the angle between two beams.
    """
    step, turn = math.radians(UP - DOWN) / (beams - 1), 2 * math.pi / shots
    distance = np.linalg.norm(xyz, axis=1)
    height = (np.arcsin(xyz[:, 2] / distance) - math.radians(DOWN)) / step
    beam = np.round(height).astype(int)
    shot = np.round(np.arctan2(xyz[:, 1], xyz[:, 0]) / turn).astype(int) % shots
    is_hit = (beam >= 0) & (beam < beams) & (abs(height - beam) < 0.25)
    index = np.flatnonzero(is_hit)[np.argsort(distance[is_hit])]
    rays, first = np.unique(beam[index] * shots + shot[index], return_index=True)
    is_open = np.setdiff1d(np.arange(beams * shots), rays)
    up, around = math.radians(DOWN) + step * (is_open // shots), turn * (is_open % shots)
    level = np.cos(up)
    directions = np.stack([level * np.cos(around), level * np.sin(around), np.sin(up)], axis=1)
    return index[first], directions


def box_at(boxes: Sequence[Box], place: Array) -> Box | None:
    """The box of most points within a third of the distance between two objects."""
    near = [box for box in boxes if math.dist(box.center[:2], place.tolist()) < APART / 3]
    return max(near, key=lambda box: box.n_points, default=None)


def rows_of(found: Sequence[tuple[Standing, Box | None]]) -> list[records.Row]:
    """A row for each range of points and one for all, then one for what is none of the labels."""
    wanted = [pair for pair in found if pair[0].kind in LABELS]
    rows = [
        scores(f"{fewest} to {most}" if most else f"{fewest} and more", part)
        for fewest, most in RANGES
        if (part := [p for p in wanted if fewest <= p[0].n_points <= (most or math.inf)])
    ]
    others = [box for one, box in found if one.kind in OTHERS and box]
    unknown = sum(box.label == UNKNOWN for box in others) / max(1, len(others))
    return [
        *rows,
        scores("all", wanted),
        {"points": "trees, poles", "objects": len(others), "unknown": unknown},
    ]


def scores(points: str, part: Sequence[tuple[Standing, Box | None]]) -> records.Row:
    """Fractions of some objects."""
    kinds = [one.kind for one, _ in part]
    return {
        "points": points,
        "objects": len(part),
        "most_frequent": max(map(kinds.count, kinds)) / len(part),
        "clustered": sum(box is not None for _, box in part) / len(part),
        "unknown": sum(box is not None and box.label == UNKNOWN for _, box in part) / len(part),
        "right": sum(box is not None and box.label == one.kind for one, box in part) / len(part),
        "best": sum(box is not None and box.best == one.kind for one, box in part) / len(part),
    }


def measure(args: argparse.Namespace) -> records.Record:
    """Scan the frames, and compare what comes out with what was there."""
    frames = [
        frame(args.seed * 100_000 + i, args.objects, args.beams, args.shots)
        for i in range(args.frames)
    ]
    scanned = scan(iter([xyz for xyz, _ in frames]), LABELS, encoder=args.encoder, up="z")
    found = [
        (one, box_at(result.boxes, one.place))
        for (_, objects), result in zip(frames, scanned)
        for one in objects
        if one.n_points >= FEWEST
    ]
    config = {name: value for name, value in vars(args).items() if name != "out"}
    return records.new_record("scan street", rows_of(found), seed=args.seed, config=config)


def main() -> None:
    """Measure, print the table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--objects", type=int, default=24, help="in a frame")
    parser.add_argument("--beams", type=int, default=64)
    parser.add_argument("--shots", type=int, default=2000, help="in a turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--encoder", default="sprout", help="one of `budwood ls encoders`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    record = measure(args)
    if args.out:
        records.write(record, args.out, overwrite=True)
    columns = {key: ".1%" if key not in ("points", "objects") else "" for key in record.rows[0]}
    print(records.table(record.rows, columns), end="")


if __name__ == "__main__":
    main()
