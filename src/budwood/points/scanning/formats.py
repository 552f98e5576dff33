"""Frames with named boxes, and the formats that they are written in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from budwood.errors import InputError
from budwood.files import read_json
from budwood.notices import warn_user
from budwood.optional import need
from budwood.points.axes import from_turned
from budwood.points.io import stem
from budwood.points.io.cloud import Array, Assumed, Cloud
from budwood.points.scanning.boxes import Box
from budwood.points.scanning.calibration import CAMERA
from budwood.points.scanning.segments import GROUND, Segments

DIGITS = 4
FORMAT = 1
DETECTED: tuple[str, ...] = (
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
)
"""What nuScenes' detection task has; its devkit refuses results with others."""
MOST_BOXES = 500
"""Boxes of a sample that nuScenes' devkit takes."""
CSV_FIELDS: tuple[str, ...] = (
    "frame",
    "label",
    "score",
    "known",
    "best",
    "x",
    "y",
    "z",
    "length",
    "width",
    "height",
    "yaw",
    "n_points",
    "n_used",
    "track",
)


@dataclass(frozen=True, eq=False)
class ScannedFrame:
    """The objects of a frame.

    Attributes:
        source: the file, or the name of the frame.
        boxes: objects with labels and unknown ones, those of most points first.
        n_points: points that were read, without those left out in reading.
        n_in_range: points in range.
        n_ground: points on the ground.
        notices: what a person should know of, such as that there is no ground.
        assumed: what was assumed about the file, and which points were left out in reading.
        segments: the points and their clusters; None for a frame that was read from a folder.
        clusters: the points that each box was named from, z up, with those of earlier frames where
            poses are known; empty for a frame that was read from a folder.
        pose: of the sensor, from its frame to the world's, shape (4, 4); None without poses.
    """

    source: str
    boxes: tuple[Box, ...]
    n_points: int
    n_in_range: int
    n_ground: int
    notices: tuple[str, ...] = ()
    assumed: Assumed = field(default_factory=Assumed)
    segments: Segments | None = None
    clusters: tuple[Array, ...] = ()
    pose: Array | None = None

    @classmethod
    def unnamed(cls, source: str, cloud: Cloud, segments: Segments) -> ScannedFrame:
        """A frame whose clusters have no names yet."""
        counts = len(cloud), len(segments.cloud), int((segments.cluster == GROUND).sum())
        notices = cloud.assumed.notes + segments.notices
        return cls(source, (), *counts, notices, cloud.assumed, segments)

    @property
    def known(self) -> tuple[Box, ...]:
        """The boxes that have one of the labels given."""
        return tuple(box for box in self.boxes if box.is_known)

    def as_json(self) -> dict[str, Any]:
        """The frame as JSON values, without its points."""
        return {
            "frame": self.source,
            "n_points": self.n_points,
            "n_in_range": self.n_in_range,
            "n_ground": self.n_ground,
            "notices": list(self.notices),
            "assumed": asdict(self.assumed),
            "pose": None if self.pose is None else self.pose.tolist(),
            "boxes": [_box_row(box) for box in self.boxes],
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ScannedFrame:
        """The frame that :meth:`as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: something is missing or of another kind.
        """
        n_points, n_in_range, n_ground = (
            int(row[key]) for key in ("n_points", "n_in_range", "n_ground")
        )
        boxes = tuple(_box_of(one) for one in row["boxes"])
        notices, assumed = tuple(row["notices"]), dict(row["assumed"])
        assumed["notes"] = tuple(assumed["notes"])
        pose = None if row["pose"] is None else np.array(row["pose"], dtype=float).reshape(4, 4)
        return cls(
            str(row["frame"]),
            boxes,
            n_points,
            n_in_range,
            n_ground,
            notices,
            Assumed(**assumed),
            pose=pose,
        )


def _box_row(box: Box) -> dict[str, Any]:
    return {
        "label": box.label,
        "score": round(box.score, DIGITS),
        "known": round(box.known, DIGITS),
        "best": box.best,
        "center": [round(x, DIGITS) for x in box.center],
        "size": [round(x, DIGITS) for x in box.size],
        "yaw": round(box.yaw, DIGITS),
        "n_points": box.n_points,
        "n_used": box.n_used,
        "track": box.track,
    }


def _box_of(row: Mapping[str, Any]) -> Box:
    values = dict(row)
    for key in ("center", "size"):
        x, y, z = (float(value) for value in values[key])
        values[key] = (x, y, z)
    return Box(**values)


def csv_text(frames: Iterable[ScannedFrame]) -> str:
    """A table of all boxes, one a line: metres and radians, z up."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for frame in frames:
        for box in frame.boxes:
            row = _box_row(box)
            row |= dict(zip("xyz", row.pop("center")))
            row |= dict(zip(("length", "width", "height"), row.pop("size")))
            writer.writerow({"frame": frame.source} | row)
    return text.getvalue()


def kitti_text(
    frame: ScannedFrame,
    to_camera: Array | None = None,
    projection: Array | None = None,
    size: tuple[int, int] | None = None,
) -> str:
    """The labels of a frame in the format of KITTI's object detection, without unknown objects.

    Truncation and occlusion are −1 (not known), and so are the sides of the box in the picture
    without a projection, and of a box outside it or partly behind the camera. KITTI's evaluation
    leaves out what is lower than 25 pixels there, and so these. The angle is that of the longer
    side, up to half a turn.

    Args:
        frame: with its boxes.
        to_camera: from the axes of the frame's file to the rectified camera, shape (4, 4); default
            a camera at the place of the LiDAR (x forward, z up), or of a frame in a camera's axes
            (-y up).
        projection: of the camera, shape (3, 4).
        size: width and height of the picture, pixels: boxes in it end at its edges.

    Raises:
        InputError: another axis of the frame points up, and there is no calibration.
    """
    up = frame.assumed.up or "z"
    if to_camera is None:
        to_camera = {"z": CAMERA, "-y": np.eye(4)}.get(up)
    if to_camera is None:
        raise InputError(
            f"{frame.source}: {up} points up, so that a camera's axes are not known, which KITTI's "
            "labels are in; give --calib"
        )
    turn = to_camera @ from_turned(up)
    lines = []
    for box in frame.known:
        length, width, height = box.size
        bottom = np.array([*box.center[:2], box.center[2] - height / 2, 1.0])
        x, y, z = (turn @ bottom)[:3]
        ahead = turn[:3, :3] @ (math.cos(box.yaw), math.sin(box.yaw), 0.0)
        angle = _turned(math.atan2(-ahead[2], ahead[0]))
        sides = _in_picture(box, turn, projection, size)
        numbers = [*sides, height, width, length, x, y, z, angle]
        alpha = _turned(angle - math.atan2(x, z))
        name = detection_name(box.label).capitalize()
        values = " ".join(f"{number:.2f}" for number in numbers)
        lines.append(f"{name} -1 -1 {alpha:.2f} {values} {box.score:.4f}\n")
    return "".join(lines)


def detection_name(label: str) -> str:
    """A label as KITTI and nuScenes write it, without blanks."""
    return "_".join(label.split())


def _in_picture(
    box: Box, turn: Array, projection: Array | None, size: tuple[int, int] | None
) -> list[float]:
    """Left, top, right and bottom of a box in the picture; −1 where it is not wholly in front."""
    if projection is None:
        return [-1.0] * 4
    corners = np.column_stack([box.corners(), np.ones(8)]) @ (projection @ turn).T
    if (corners[:, 2] <= 0).any():
        return [-1.0] * 4
    flat = corners[:, :2] / corners[:, 2:]
    low, high = flat.min(axis=0), flat.max(axis=0)
    if size is not None:
        last = np.array(size) - 1  # pixels count from 0
        low, high = low.clip(0, last), high.clip(0, last)
        if (low == high).any():
            return [-1.0] * 4
    return [*low, *high]


def _turned(angle: float) -> float:
    """The same angle in [−π, π)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def nuscenes_notes(labels: Iterable[str], has_tokens: bool, has_poses: bool) -> list[str]:
    """What nuScenes' devkit will not take of results with these labels, or not understand.

    Args:
        labels: that boxes may have.
        has_tokens: whether the tokens of the samples are known.
        has_poses: whether the poses of the sensor are.
    """
    notes = []
    strange = [label for label in labels if detection_name(label).lower() not in DETECTED]
    if strange:
        notes.append(
            f"nuScenes' devkit refuses results with the labels {', '.join(strange)}; those of its "
            f"detection task are {', '.join(DETECTED)}"
        )
    if not has_tokens:
        boxes = "" if has_poses else ", and boxes are in the sensor's frame, not the world's"
        notes.append(
            f"nuScenes' results have the names of files as sample tokens{boxes}; give the folder "
            "of nuScenes' tables as poses (--poses)"
        )
    return notes


def nuscenes_results(
    frames: Iterable[ScannedFrame], tokens: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Results as nuScenes' detection task has them; unknown objects are left out.

    Boxes are in the world's frame where poses are known, else in the sensor's. Sizes are width,
    length, height, rotations quaternions w, x, y, z. Velocities are 0. Labels are in lower case.

    Of a frame with more than 500 boxes, those with the highest scores are taken; warns
    (:class:`InputWarning`) of how many are left out.

    Args:
        frames: of a recording.
        tokens: name of a frame's file → token of its sample; frames without one are left out. None
            for the names without suffixes.
    """
    transform = need("scipy.spatial.transform", "writing nuScenes' format")
    results: dict[str, list[dict[str, Any]]] = {}
    n_left_out = n_full = 0
    for frame in frames:
        file = Path(frame.source)
        token = stem(file) if tokens is None else tokens.get(file.name)
        if token is None:
            continue
        pose = np.eye(4) if frame.pose is None else frame.pose
        rows = []
        boxes = sorted(frame.known, key=lambda box: -box.score)
        n_left_out += len(boxes[MOST_BOXES:])
        n_full += len(boxes) > MOST_BOXES
        for box in boxes[:MOST_BOXES]:
            turn = transform.Rotation.from_euler("z", box.yaw)
            x, y, z, w = (transform.Rotation.from_matrix(pose[:3, :3]) * turn).as_quat().tolist()
            length, width, height = box.size
            rows.append(
                {
                    "sample_token": token,
                    "translation": (pose[:3, :3] @ box.center + pose[:3, 3]).round(DIGITS).tolist(),
                    "size": [round(side, DIGITS) for side in (width, length, height)],
                    "rotation": [round(value, 6) for value in (w, x, y, z)],
                    "velocity": [0.0, 0.0],
                    "detection_name": detection_name(box.label).lower(),
                    "detection_score": round(box.score, DIGITS),
                    "attribute_name": "",
                }
            )
        results[token] = rows
    if n_left_out:
        warn_user(
            f"nuScenes' results take {MOST_BOXES} boxes of a sample: in {n_full:,} frames with "
            f"more, {n_left_out:,} boxes with the lowest scores are left out"
        )
    uses = {f"use_{sensor}": sensor == "lidar" for sensor in ("camera", "lidar", "radar", "map")}
    return {"meta": uses | {"use_external": False}, "results": results}


def json_text(frame: ScannedFrame, **more: Any) -> str:
    """A frame as a JSON file."""
    return json.dumps({"format": FORMAT, **more, **frame.as_json()}, ensure_ascii=False) + "\n"


def read_frame(path: Path) -> tuple[ScannedFrame, dict[str, Any]]:
    """Read what :func:`json_text` gave.

    Returns:
        The frame, and everything in the file.

    Raises:
        InputError: it can't be read, or holds something else.
    """
    row = read_json(path)
    try:
        if row["format"] != FORMAT:
            raise ValueError(f"format {row['format']!r}; this version reads {FORMAT}")
        return ScannedFrame.from_json(row), row
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no boxes of a frame: {error}") from None
