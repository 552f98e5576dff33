"""KITTI's calibrations: where the camera of a frame is, and how large its picture is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from budwood.errors import InputError
from budwood.points.io import stem
from budwood.points.io.cloud import Array

CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
"""From a LiDAR (x forward, y left, z up) to a camera at the same place (x right, y down)."""
PICTURE = (1242, 375)
"""Width and height of most pictures of KITTI, pixels; the others differ by up to 18."""
NEAR_MIDDLE = 0.1
"""A camera has its axis this near the middle of its picture, as a fraction of the sides."""


@dataclass(frozen=True, eq=False)
class Camera:
    """The camera of a frame.

    Attributes:
        to_camera: from the axes of the frame's file to the rectified camera, shape (4, 4); None if
            no calibration is known.
        projection: of the left colour camera, shape (3, 4); None if it is not known.
        size: width and height of its picture, pixels; None if they are not known.
        is_assumed: whether the size is that of most pictures of KITTI.
        unusable: why the ``calib.txt`` beside the frames is not used; None if it is, or is missing.
    """

    to_camera: Array | None = None
    projection: Array | None = None
    size: tuple[int, int] | None = None
    is_assumed: bool = False
    unusable: str | None = None

    @property
    def mark(self) -> str:
        """What labels depend on, in eight letters; none if nothing is known."""
        parts = [self.to_camera, self.projection, self.size]
        values = b"".join(np.asarray(part, float).tobytes() for part in parts if part is not None)
        return hashlib.sha256(values).hexdigest()[:8] if values else ""

    def note(self, up: str) -> str | None:
        """What labels assume of a frame in whose axes ``up`` points up."""
        if self.to_camera is None:
            if up == "-y":  # the axes of a camera
                return None
            found = f" ({self.unusable})" if self.unusable else ""
            return (
                "KITTI's labels: the camera is assumed at the place of the LiDAR, and 2D boxes are "
                f"left out; give a calibration (--calib){found}"
            )
        if self.projection is None or (self.size and not self.is_assumed):
            return None
        width, height = PICTURE
        about = (
            f"pictures of {width} × {height} pixels are assumed, and 2D boxes end at their edges"
            if self.size
            else "2D boxes may go beyond the edges of the picture, whose size is not known"
        )
        return f"KITTI's labels: {about}; put the pictures into image_2 beside the frames' folder"


class Cameras:
    """The cameras of frames.

    Args:
        calibration: as of :func:`calibration_of`.

    Raises:
        InputError: a file that is no calibration.
    """

    def __init__(self, calibration: str | os.PathLike[str] | None = None) -> None:
        self.calibration = calibration
        self._read: dict[Path, dict[str, Array]] = {}
        if calibration is not None and not Path(calibration).is_dir():
            self._values(Path(calibration))

    def of(self, source: str) -> Camera:
        """The camera of a frame.

        Args:
            source: its file, or the name of an array, which has nothing beside it.

        Raises:
            InputError: there is no calibration of it where one must be, or an unusable one.
        """
        frame = Path(source)
        if self.calibration is None and not frame.is_file():
            return Camera()
        file = calibration_of(frame, self.calibration)
        if file is None:
            return Camera()
        try:
            values = self._values(file)
        except InputError as error:
            if self.calibration is not None:
                raise
            return Camera(unusable=str(error))  # another file that is called calib.txt
        projection = values.get("P")
        if projection is None:
            return Camera(values["Tr"])
        size = _size_of_picture(frame)
        if size is None and _fits(projection, PICTURE):
            return Camera(values["Tr"], projection, PICTURE, is_assumed=True)
        return Camera(values["Tr"], projection, size)

    def _values(self, file: Path) -> dict[str, Array]:
        if file not in self._read:
            self._read[file] = read_calibration(file)
        return self._read[file]


def calibration_of(frame: Path, given: str | os.PathLike[str] | None) -> Path | None:
    """The file with the calibration of a frame.

    Args:
        frame: its file.
        given: a file for all frames, or a folder with one for each, such as ``000000.txt``; default
            the ``calib.txt`` beside the folder of the frame, if there is one.

    Raises:
        InputError: the folder has none of the frame.
    """
    if given is None:
        beside = frame.absolute().parent.parent / "calib.txt"
        return beside if beside.is_file() else None
    folder = Path(given)
    if not folder.is_dir():
        return folder
    file = folder / f"{stem(frame)}.txt"
    if not file.is_file():
        raise InputError(
            f"{folder} has no {file.name} for the frame {frame}; add it, or give one file for all"
        )
    return file


def read_calibration(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read a calibration of KITTI, of odometry or of object detection.

    Returns:
        ``Tr``: from the LiDAR to the (rectified) camera, shape (4, 4); ``P``: the left colour
        camera's projection, shape (3, 4), where the file has it.

    Raises:
        InputError: the file cannot be read, or has no ``Tr`` or ``Tr_velo_to_cam``.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        parts = [line.partition(":") for line in lines if ":" in line]
        values = {key.strip(): np.array(text.split(), dtype=float) for key, _, text in parts}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path} is not a KITTI calibration: {error}") from None
    name = next((key for key in ("Tr_velo_to_cam", "Tr") if key in values), None)
    if name is None or values[name].size != 12:
        raise InputError(f"{path} is not a KITTI calibration: it has no Tr of 12 numbers")
    found = {"Tr": _square(values[name])}
    rectify = values.get("R0_rect")
    if rectify is not None and rectify.size == 9:
        turn = np.eye(4)
        turn[:3, :3] = rectify.reshape(3, 3)
        found["Tr"] = turn @ found["Tr"]
    if values.get("P2", np.empty(0)).size == 12:
        found["P"] = values["P2"].reshape(3, 4)
    return found


def _square(numbers: Array) -> Array:
    return np.vstack([numbers.reshape(3, 4), [0, 0, 0, 1]])


def _size_of_picture(frame: Path) -> tuple[int, int] | None:
    """The size of a frame's picture, in the folder ``image_2`` beside its own; None without one."""
    for suffix in (".png", ".jpg"):
        file = frame.absolute().parent.parent / "image_2" / f"{stem(frame)}{suffix}"
        try:
            with Image.open(file) as picture:
                return picture.size
        except (OSError, Image.DecompressionBombError):  # none, or damaged
            continue
    return None


def _fits(projection: Array, size: tuple[int, int]) -> bool:
    """Whether a camera's axis is near the middle of a picture of this size."""
    axis, sides = projection[:2, 2], projection[2, 2] * np.array(size)
    return bool((np.abs(axis - sides / 2) < NEAR_MIDDLE * sides).all())
