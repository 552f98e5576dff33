"""Where the sensor was in each frame: poses of KITTI odometry and of nuScenes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError, first_line
from budwood.files import read_json
from budwood.optional import need
from budwood.points.accumulation import rigid_motions
from budwood.points.io import stem
from budwood.points.io.cloud import Array
from budwood.points.scanning.calibration import CAMERA, calibration_of, read_calibration


@dataclass(frozen=True, eq=False)
class Poses:
    """Where the sensor was.

    Attributes:
        matrices: from the sensor's frame to the world's, one a frame, shape (n_frames, 4, 4).
        tokens: name of a frame's file → its sample token in nuScenes, without sweeps between
            samples; None for other sources.
        times: of the frames, microseconds, shape (n_frames,); None where the source has none.
        notices: what was assumed.
    """

    matrices: Array
    tokens: Mapping[str, str] | None = None
    times: NDArray[np.int64] | None = None
    notices: tuple[str, ...] = ()

    def order(self) -> list[int]:
        """The frames in the order of time; as they are where times are not known."""
        if self.times is None:
            return list(range(len(self.matrices)))
        return self.times.argsort(kind="stable").tolist()

    def take(self, order: Sequence[int]) -> Poses:
        """The poses of the frames in another order."""
        times = None if self.times is None else self.times[order]
        return replace(self, matrices=self.matrices[order], times=times)


def read_poses(
    path: str | os.PathLike[str],
    frames: Sequence[str | os.PathLike[str]],
    calibration: str | os.PathLike[str] | None = None,
) -> Poses:
    """Read the poses of frames.

    Args:
        path: a text file of KITTI odometry (12 numbers a line, camera to world, a line a frame),
            or a folder with nuScenes' tables ``sample_data.json``, ``ego_pose.json`` and
            ``calibrated_sensor.json``.
        frames: files of the frames. If a KITTI file has more lines, the number in the name of a
            frame is its line; names that are no numbers stand in the order of the lines.
        calibration: KITTI's ``calib.txt``, or a folder with a file for each frame, such as
            ``000000.txt``; default the one beside the folder of the frames, or, without one, a
            camera at the place of the LiDAR.

    Returns:
        The poses in the order of the frames.

    Raises:
        InputError: no such file, something else in it, or poses that do not match the frames.
    """
    source, files = Path(path), [Path(frame) for frame in frames]
    if not source.exists():
        raise InputError(f"poses {source} do not exist")
    return _nuscenes(source, files) if source.is_dir() else _kitti(source, files, calibration)


def check_poses(poses: Any, n_frames: int, source: str = "the poses given") -> Array:
    """Check that an array is a pose for each frame.

    Returns:
        Float64, shape (n_frames, 4, 4).

    Raises:
        InputError: another shape, another number of frames, or no rotation in one of them.
    """
    try:
        moves = rigid_motions(poses, n_frames)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return np.concatenate([moves, np.tile([[[0.0, 0, 0, 1]]], (n_frames, 1, 1))], axis=1)


def _kitti(path: Path, frames: list[Path], calibration: str | os.PathLike[str] | None) -> Poses:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of a file without numbers
            rows = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read poses {path}: {first_line(error)}") from None
    if rows.shape[1] != 12:
        raise InputError(
            f"{path} has {rows.shape[1]} numbers a line; poses of KITTI odometry have 12"
        )
    rows = rows[_lines(path, len(rows), frames)]
    matrices = np.tile(np.eye(4), (len(rows), 1, 1))
    matrices[:, :3] = rows.reshape(-1, 3, 4)
    files = [calibration_of(frame, calibration) for frame in frames]
    moves = {file: CAMERA if file is None else read_calibration(file)["Tr"] for file in {*files}}
    matrices @= np.stack([moves[file] for file in files])
    notices = ()
    if None in moves:
        notices = (
            "poses are read as those of a camera at the place of the LiDAR: there is no calib.txt",
        )
    return Poses(check_poses(matrices, len(frames), str(path)), notices=notices)


def _lines(path: Path, n_lines: int, frames: list[Path]) -> list[int]:
    """The line of each frame: the number in its name, or its place among as many frames."""
    names = [stem(frame) for frame in frames]
    numbers = [int(name) for name in names if name.isdecimal() and int(name) < n_lines]
    if len(set(numbers)) == len(frames):
        return numbers
    if n_lines == len(frames):
        return list(range(n_lines))
    raise InputError(
        f"{path} has {n_lines} poses, and there are {len(frames)} frames; give the frames of the "
        "poses, or frames whose names are the numbers of their lines"
    )


def _nuscenes(folder: Path, frames: list[Path]) -> Poses:
    shots = {Path(row["filename"]).name: row for row in _table(folder, "sample_data", "filename")}
    missing = [frame for frame in frames if frame.name not in shots]
    if missing:
        raise InputError(
            f"{folder} has no sample_data of {missing[0].name} and {len(missing) - 1} more of "
            f"{len(frames)} frames: it is of another recording"
        )
    tables = {name: _by_token(folder, name) for name in ("ego_pose", "calibrated_sensor")}
    rows = [shots[frame.name] for frame in frames]
    try:
        matrices = [
            _rigid(tables["ego_pose"][row["ego_pose_token"]])
            @ _rigid(tables["calibrated_sensor"][row["calibrated_sensor_token"]])
            for row in rows
        ]
        tokens = {
            frame.name: str(row["sample_token"])
            for frame, row in zip(frames, rows)
            if row.get("is_key_frame", True)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no complete tables of nuScenes: {error}") from None
    n_sweeps, notices = len(frames) - len(tokens), ()
    if n_sweeps:
        notices = (
            f"{n_sweeps} of {len(frames)} frames are sweeps between samples, which nuScenes' "
            "format has no place for",
        )
    matrices = check_poses(matrices, len(frames), str(folder))
    return Poses(matrices, tokens, _times(rows), notices)


def _times(rows: list[dict[str, Any]]) -> NDArray[np.int64] | None:
    """When frames were taken, microseconds; None where a row does not say it."""
    times = [row.get("timestamp") for row in rows]
    known = all(isinstance(time, int) for time in times)
    return np.array(times, dtype=np.int64) if known else None


def _by_token(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    return {row["token"]: row for row in _table(folder, name, "token")}


def _table(folder: Path, name: str, key: str) -> list[dict[str, Any]]:
    rows = read_json(folder / f"{name}.json")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and key in row for row in rows):
        raise InputError(f"{folder / name}.json is not a nuScenes table")
    return rows


def _rigid(row: dict[str, Any]) -> Array:
    """The matrix of a rotation (a quaternion w, x, y, z) and a translation."""
    transform = need("scipy.spatial.transform", "reading poses")
    w, x, y, z = row["rotation"]
    matrix = np.eye(4)
    matrix[:3, :3] = transform.Rotation.from_quat([x, y, z, w]).as_matrix()
    matrix[:3, 3] = row["translation"]
    return matrix
