"""The folder of a scan: a file a frame, so that what is finished stays and is not done again."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from budwood import catalogue
from budwood.errors import InputError, OutputError
from budwood.figures import need_matplotlib
from budwood.files import need_parent, write_text, write_whole
from budwood.notices import warn_user
from budwood.points.io import stem
from budwood.points.io.cloud import Cloud
from budwood.points.scanning.calibration import Camera, Cameras
from budwood.points.scanning.formats import (
    ScannedFrame,
    csv_text,
    json_text,
    kitti_text,
    nuscenes_results,
    read_frame,
)
from budwood.points.scanning.poses import Poses
from budwood.points.scanning.views import draw_from_above, need_plotly, write_page
from budwood.registry import Registry
from budwood.runs import RunFolder

NPY_HEADER = 128
"""Bytes before the points in a .npy file."""
BOX_FORMATS = Registry("box format", catalogue.BOX_FORMATS)
_OF_POINTS = frozenset(("clusters", "png", "html"))
"""Formats with a file a frame that show its points, which a finished frame has no more."""
_OF_EACH = _OF_POINTS | {"kitti"}
"""Formats with a file a frame."""


class ScanFolder:
    """A folder with the boxes of frames.

    ``boxes/NAME.json`` is written last of a frame's files: a frame that has it is finished, in the
    formats that it lists. Warns once (:class:`InputWarning`) of what labels of KITTI assume.

    Args:
        path: a new folder, or one of an earlier run with the same settings.
        settings: what the boxes depend on, as JSON values.
        formats: names in ``BOX_FORMATS``; ``"json"`` is always written.
        calibration: KITTI's, for labels in its format, as of :func:`calibration_of`.
        poses: of the frames, for nuScenes' format.

    Raises:
        InputError: an unusable calibration.
        MissingPackageError: a package for a format is not installed.
        OutputError: the folder holds another run or other files, or can't be written.
        UnknownNameError: no such format.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: dict[str, Any],
        formats: Sequence[str] = ("json",),
        calibration: str | os.PathLike[str] | None = None,
        poses: Poses | None = None,
    ) -> None:
        check_formats(formats)
        self.path, self.formats, self.poses = Path(path), frozenset(formats), poses
        self._cameras = Cameras(calibration) if "kitti" in self.formats else None
        need_parent(self.path)
        self._run = RunFolder(self.path, settings | {"poses": poses is not None})
        self._names: dict[str, str] = {}
        self._marks: dict[str, str] = {}
        self._written: dict[str, frozenset[str]] = {}
        self._camera: dict[str, Camera] = {}
        self._said: set[str] = set()
        self._tracks: set[int] = set()
        self._order: list[str] = []
        self._n_done = 0

    def claimed(self) -> AbstractContextManager[None]:
        """Lock the folder against other processes."""
        return self._run.claimed()

    def finished(self, index: int, source: str, item: Any) -> ScannedFrame | None:
        """The frame as an earlier run left it; None if it has to be scanned, also for its points.

        Args:
            index: of the frame among all.
            source: name of the frame.
            item: what it is read from. A file of another size or time, or an array with other
                values, is another frame, and so is one with another pose.

        Raises:
            InputError: two frames of one name, or no usable calibration of this one.
        """
        name = self._name(source)
        pose = None if self.poses is None else self.poses.matrices[index]
        self._marks[name] = _mark(item, pose)
        if self._cameras is not None:
            self._camera[name] = self._cameras.of(source)
        self._order.append(name)
        try:
            frame, row = read_frame(self._file(name))
        except InputError:
            return None
        if row.get("mark") != self._marks[name]:
            return None
        self._written[name] = frozenset(row.get("written", ()))
        lacking = self._wanted(name) - self._written[name]
        if lacking & _OF_POINTS:
            return None
        self._tracks |= {box.track for box in frame.boxes if box.track is not None}
        if lacking:  # labels, which boxes suffice for
            self._write(frame, frozenset(("kitti",)))
        else:
            self._note(frame, name)
            self._n_done += 1
        return frame

    def write(self, frame: ScannedFrame) -> None:
        """Write the files of a frame.

        Raises:
            OutputError: one cannot be written; the message says what stays.
        """
        self._write(frame, self.formats)

    def _write(self, frame: ScannedFrame, formats: frozenset[str]) -> None:
        name = self._name(frame.source)
        try:
            self._write_others(frame, name, formats)
            earlier = self._written.get(name, frozenset())
            kept = {one for one in earlier if one.partition(" ")[0] not in self.formats}
            written = self._wanted(name) | kept
            text = json_text(frame, mark=self._marks[name], written=sorted(written))
            write_text(self._file(name), text)
        except OutputError as error:
            raise OutputError(
                f"{error}; finished frames stay ({self._n_done:,}): make room and give the same "
                "command again"
            ) from error
        self._n_done += 1

    def finish(self) -> None:
        """Write the tables of all frames, and mark the run as complete."""
        if "csv" in self.formats:
            write_text(self.path / "boxes.csv", csv_text(self._frames()))
        if "nuscenes" in self.formats:
            tokens = None if self.poses is None else self.poses.tokens
            results = nuscenes_results(self._frames(), tokens)
            write_text(self.path / "nuscenes.json", json.dumps(results))
        self._run.complete()

    def _write_others(self, frame: ScannedFrame, name: str, formats: frozenset[str]) -> None:
        if "kitti" in formats:
            self._note(frame, name)
            camera = self._camera[name]
            text = kitti_text(frame, camera.to_camera, camera.projection, camera.size)
            write_text(self.path / "kitti" / f"{name}.txt", text)
        if "clusters" in formats:
            self._write_clusters(frame, name)
        if "png" in formats:
            file = self.path / "views" / f"{name}.png"
            write_whole(file, lambda part: draw_from_above(frame, part))
        if "html" in formats:
            file = self.path / "pages" / f"{name}.html"
            write_whole(file, lambda part: write_page(frame, part))

    def _write_clusters(self, frame: ScannedFrame, name: str) -> None:
        """Write the points of each object, of an object in several frames those of the densest."""
        for old in (self.path / "clusters").glob(f"{glob.escape(name)}-[0-9][0-9][0-9][0-9].npy"):
            old.unlink()
        for i, (box, xyz) in enumerate(zip(frame.boxes, frame.clusters)):
            called = f"{name}-{i:04}" if box.track is None else f"object-{box.track:06}"
            file = self.path / "clusters" / f"{called}.npy"
            points = xyz.astype(np.float32)
            known = box.track in self._tracks  # others are of an earlier run
            if not known or _size(file) - NPY_HEADER < points.nbytes:
                write_whole(file, lambda part, points=points: np.save(part, points))
            if box.track is not None:
                self._tracks.add(box.track)

    def _wanted(self, name: str) -> frozenset[str]:
        """The formats of a frame, as they are noted with it: KITTI's also depends on the camera."""
        camera = self._camera.get(name, Camera())
        labels = f"kitti {camera.mark}".rstrip()
        return frozenset(labels if one == "kitti" else one for one in self.formats & _OF_EACH)

    def _note(self, frame: ScannedFrame, name: str) -> None:
        """Say once what the labels of frames assume."""
        camera = self._camera.get(name)
        note = camera and camera.note(frame.assumed.up or "z")
        if note and note not in self._said:
            self._said.add(note)
            warn_user(note)

    def _frames(self) -> Iterator[ScannedFrame]:
        """The finished frames, in the order of the run."""
        for name in self._order:
            file = self._file(name)
            if file.is_file():
                yield read_frame(file)[0]

    def _file(self, name: str) -> Path:
        return self.path / "boxes" / f"{name}.json"

    def _name(self, source: str) -> str:
        """The name of a frame's files: that of its file, with its folders' where it is taken."""
        if source not in self._names:
            parts = [*Path(source).parts[:-1], stem(Path(source))]
            name = parts.pop()
            while self._is_taken(name, source) and parts:
                name = f"{parts.pop()}_{name}".replace(os.sep, "_")
            if self._is_taken(name, source):
                raise InputError(f"two frames are called {source}; give each one name")
            self._names[source] = name
        return self._names[source]

    def _is_taken(self, name: str, source: str) -> bool:
        """Whether another frame has a name, in this run or in an earlier one."""
        if name in self._names.values():
            return True
        try:
            return read_frame(self._file(name))[0].source != source
        except InputError:
            return False


def check_formats(formats: Sequence[str]) -> None:
    """Check names of formats and the packages that they need, before slow work.

    Raises:
        UnknownNameError: no such format.
        MissingPackageError: a package is not installed.
    """
    if isinstance(formats, str):
        raise InputError(f"formats={formats!r} is one string; give a list of names")
    for name in formats:
        BOX_FORMATS.check(name)
    if "png" in formats:
        need_matplotlib()
    if "html" in formats:
        need_plotly()


def _mark(item: Any, pose: Any) -> str:
    """What a frame is known by: the size and time of its file, or its values; and its pose."""
    sha = hashlib.sha256()
    if isinstance(item, (str, os.PathLike)) and Path(item).is_file():
        about = Path(item).stat()
        sha.update(f"{about.st_size} {about.st_mtime_ns}".encode())
    else:
        for part in (item.xyz, item.rgb) if isinstance(item, Cloud) else (item,):
            values = np.asarray(part)
            sha.update(f"{values.dtype} {values.shape}".encode() + values.tobytes())
    if pose is not None:
        sha.update(np.asarray(pose, dtype=np.float64).tobytes())
    return sha.hexdigest()[:16]


def _size(file: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return file.stat().st_size if file.is_file() else 0
