"""From frames to named boxes: read, crop, remove the ground, cluster, name, reject."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch

from budwood.checks import need_at_least, need_kind
from budwood.errors import InputError, MissingPackageError
from budwood.notices import warn_user
from budwood.points.adapters import Adapter, fingerprint
from budwood.points.axes import from_turned, to_up
from budwood.points.encoders import PointEncoder
from budwood.points.inputs import CloudLike, InputOptions, OnError, is_one_cloud, named
from budwood.points.io import find_files
from budwood.points.io.cloud import Array, Cloud
from budwood.points.io.units import AUTO, METRES, check_units
from budwood.points.scanning.boxes import Box, fit_box
from budwood.points.scanning.config import ScanConfig
from budwood.points.scanning.folder import ScanFolder, check_formats
from budwood.points.scanning.formats import ScannedFrame, detection_name, nuscenes_notes
from budwood.points.scanning.naming import Name, Namer, make_namer
from budwood.points.scanning.poses import Poses, check_poses, read_poses
from budwood.points.scanning.rejection import digest_of
from budwood.points.scanning.segments import Segments, segment
from budwood.points.scanning.tracks import Tracker
from budwood.points.text import TextEmbeddings
from budwood.points.towers import TextTower

FOLLOWED = 0.2
"""Poses that let fewer objects than this fraction be followed from frame to frame are doubted."""


def scan(
    frames: CloudLike | Iterable[CloudLike],
    labels: Sequence[str] | TextEmbeddings | None = None,
    config: ScanConfig | None = None,
    *,
    poses: Any = None,
    calibration: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    formats: Sequence[str] = ("json",),
    encoder: str | PointEncoder | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    adapter: str | os.PathLike[str] | Adapter | None = None,
    up: str = "z",
    units: str = AUTO,
    columns: str | None = None,
    box: Sequence[float | str] | None = None,
    invalid: str = "error",
    text: str | TextTower | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    templates: str | Sequence[str] = "short",
    synonyms: bool = True,
    background: Sequence[str] | TextEmbeddings | None = None,
    batch_frames: int = 8,
    batch_size: int = 64,
    on_error: OnError | None = None,
) -> list[ScannedFrame] | Iterator[ScannedFrame]:
    """Find the objects in frames of a sensor, and name them.

    Each frame is cropped to a range, its ground is removed, what stands on it is clustered, and
    each cluster is named, or is ``"unknown"`` if it resembles none of the labels more than what
    is around. With the poses of the sensor, objects are followed over frames, and the points of the
    last frames together name an object.

    It returns a list for one frame or a list of them, and an iterator for an iterator. The iterator
    holds ``batch_frames`` frames at once, for any number of them.

    Example::

        for frame in scan(iter(sorted(Path("velodyne").glob("*.bin"))), ["car", "pedestrian"]):
            print(frame.source, [box.label for box in frame.boxes])

    Args:
        frames: files, folders, clouds or arrays, as of :func:`budwood.points.classify`. Lengths are
            metres, and the sensor is at the origin.
        labels: distinct labels, or their embeddings.
        config: how frames are cut into objects.
        poses: of the sensor, in the order of the frames: a file of KITTI odometry or a folder with
            nuScenes' tables, both as in :func:`read_poses`, or an array of shape (n_frames, 4, 4)
            that leads from the sensor's frame to the world's. Frames of nuScenes are put into the
            order of time.
        calibration: KITTI's ``calib.txt``, or a folder with a file for each frame, such as
            ``000000.txt``; for poses and labels in KITTI's format. Default: the ``calib.txt``
            beside the folder of a frame, or, without one, a camera at the place of the LiDAR.
        output: a folder for boxes, a file a frame; frames that are finished there are not scanned
            again, and come without points.
        formats: names in ``BOX_FORMATS`` that are written there.
        encoder: a name in ``ENCODERS``, or an encoder; default the adapter's, or ``"sprout"``.
        checkpoint: a local file for a named encoder.
        device: where a named encoder runs, or ``"auto"``; default the CPU.
        adapter: a folder that an adapter was saved to, or an adapter.
        up: the axis of the frames that points up, in ``AXES``; ``"auto"``: by the format of the
            file. Boxes are in the frame turned so that it is z.
        units: of the frames, a name in ``budwood.points.io.units.METRES``; ``"auto"``: as the file
            or its format says, or metres. Boxes and the translations of poses are in metres.
        columns: letters of the columns of tables and arrays, such as ``"xyz_"``.
        box: x0, y0, z0, x1, y1, z1 in the axes and units of the file: keep the points inside.
        invalid: ``"error"``, or ``"drop"`` to leave out points of which one or two coordinates are
            NaN or infinite.
        text: a text tower instead of the encoder's.
        embeddings: a file with embeddings of labels, instead of a text tower; with ``labels``, only
            those are taken from it.
        templates: a name in ``TEMPLATES``, or sentences with ``{}``; also of the background.
        synonyms: as of :func:`budwood.points.classify`.
        background: labels of what is around, to be told from the objects; default ``BACKGROUND``,
            or what a file of embeddings has of it. Beside embeddings given as ``labels`` there is
            none unless it is given as embeddings too.
        batch_frames: frames whose clusters are encoded together.
        batch_size: clusters at once.
        on_error: called with the name of a frame that cannot be used and the error; the frame is
            left out. Default: raise the error.

    Warns once each (:class:`InputWarning`) of labels that nothing in the encoder's training
    resembles, of frames that are put into the order of time, and of what KITTI's labels and
    nuScenes' results assume or lack.

    Returns:
        A :class:`ScannedFrame` for each usable frame, in their order.

    Raises:
        InputError: unusable labels or options, no frames, poses that do not match, or an unusable
            frame.
        OutputError: the folder is of a run with other settings, or cannot be written; what is
            finished stays.
        MissingPackageError: a package is not installed.
        UnsupportedModelError: an adapter for another encoder, or one that looks at other clouds.
    """
    need_kind(ScanConfig, "ScanConfig", config=config)
    config = config or ScanConfig()
    need_at_least(1, batch_frames=batch_frames, batch_size=batch_size)
    check_units(units)
    options = InputOptions(
        up=up, columns=columns, box=box, invalid=invalid, strays="keep", seed=config.seed
    )
    _check_used(output, formats, poses, calibration, config)
    if isinstance(frames, Sized) and not isinstance(frames, (str, Cloud)) and len(frames) == 0:
        raise InputError("there are no frames; give at least one")
    many = not is_one_cloud(frames) and isinstance(frames, Iterator)
    if poses is not None:
        frames, poses = _with_poses(frames, poses, calibration)
    namer = make_namer(
        labels,
        config,
        encoder=encoder,
        checkpoint=checkpoint,
        device=device,
        adapter=adapter,
        text=text,
        embeddings=embeddings,
        templates=templates,
        synonyms=synonyms,
        background=background,
        batch_size=batch_size,
    )
    _check_names(namer.labels.given, formats)
    if "nuscenes" in formats:
        has_tokens = poses is not None and poses.tokens is not None
        for note in nuscenes_notes(namer.labels.given, has_tokens, poses is not None):
            warn_user(note)
    folder = None
    if output is not None:
        settings = about(namer, config, options)
        settings["text"] = text.id if isinstance(text, TextTower) else text and str(text)
        settings["templates"] = templates
        if units != AUTO:  # folders of earlier versions do not have it
            settings["units"] = units
        folder = ScanFolder(output, settings, formats, calibration, poses)
    found = _Scan(config, options, units, namer, poses, folder, on_error)(frames, batch_frames)
    return found if many else list(found)


def _check_used(
    output: Any, formats: Any, poses: Any, calibration: Any, config: ScanConfig
) -> None:
    """Refuse options that have no effect without others."""
    need_kind((str, os.PathLike), "folder", output=output)
    check_formats(formats)
    if output is None and list(formats) != ["json"]:
        raise InputError("formats says what to write into output (--output); give both")
    if calibration is not None and poses is None and (output is None or "kitti" not in formats):
        raise InputError(
            "a calibration (--calib) is for poses and for boxes in KITTI's format; give one of "
            "these, or leave it out"
        )
    if poses is None and config.window != ScanConfig.window:
        raise InputError(
            f"window={config.window} is for frames with poses (--poses); give both, or neither"
        )


def _check_names(labels: Sequence[str], formats: Sequence[str]) -> None:
    """Refuse labels that KITTI and nuScenes would write alike.

    Raises:
        InputError: two labels differ only in blanks, underscores or case.
    """
    if not {"kitti", "nuscenes"} & {*formats}:
        return
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(detection_name(label).lower(), label)
        if other != label:
            raise InputError(
                f"labels {other!r} and {label!r} have the same name in KITTI's and nuScenes' "
                "formats; give one of them"
            )


def about(namer: Namer, config: ScanConfig, options: InputOptions) -> dict[str, Any]:
    """The settings that boxes depend on, as JSON values."""
    adapter, vectors = namer.adapter, namer.labels.texts.vectors.cpu().float()
    settings = {
        "labels": list(namer.labels.given),
        "background": list(namer.labels.texts.labels[namer.labels.n_given :]),
        "encoder": fingerprint(namer.encoder),
        "adapter": None if adapter is None else f"{adapter.name} {digest_of(adapter)}",
        "vectors": hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:16],
        "threshold": round(namer.threshold, 6),
    }
    reading = {key: getattr(options, key) for key in ("up", "columns", "box", "invalid")}
    rest = {key: value for key, value in vars(config).items() if key != "threshold"}
    return settings | reading | rest


def _with_poses(
    frames: CloudLike | Iterable[CloudLike], poses: Any, calibration: Any
) -> tuple[list[CloudLike], Poses]:
    """The frames as a list, in the order of time where it is known, and a pose for each."""
    if isinstance(poses, (str, os.PathLike)):
        items = frames if not is_one_cloud(frames) else [frames]
        paths = [item for item in items if isinstance(item, (str, os.PathLike))]  # type: ignore[union-attr]
        files = find_files(paths)
        found = read_poses(poses, files, calibration)
        order = found.order()
        if order != sorted(order):
            warn_user(
                "the frames are not in the order of time, in which objects are tracked; they are "
                "put into it"
            )
        return [files[i] for i in order], found.take(order)
    listed: list[CloudLike] = [item for _, item in named(frames, _raise)]
    return listed, Poses(check_poses(poses, len(listed)))


def _raise(name: str, error: Exception) -> None:
    raise error


@dataclass(frozen=True, eq=False)
class _Cut:
    """A frame that is cut into clusters, and not named yet; or one that is finished.

    Attributes:
        frame: without boxes, or finished.
        clusters: what is named; with poses, points of earlier frames are among them.
        shapes: points of the clusters in this frame alone, for their boxes.
        numbers: of the objects; None without poses.
    """

    frame: ScannedFrame
    clusters: list[Cloud]
    shapes: list[Array]
    numbers: list[int | None]


class _Scan:
    """One run of :func:`scan`."""

    def __init__(
        self,
        config: ScanConfig,
        options: InputOptions,
        units: str,
        namer: Namer,
        poses: Poses | None,
        folder: ScanFolder | None,
        on_error: OnError | None,
    ) -> None:
        self.config, self.options, self.units, self.namer = config, options, units, namer
        self.poses, self.folder = poses, folder
        self.refuse = _raise if on_error is None else on_error
        self.tracker = Tracker(config.window) if poses is not None else None

    def __call__(
        self, frames: CloudLike | Iterable[CloudLike], batch_frames: int
    ) -> Iterator[ScannedFrame]:
        if self.folder is None:
            yield from self._frames(frames, batch_frames)
            return
        with self.folder.claimed():
            yield from self._frames(frames, batch_frames)
            self.folder.finish()

    def _frames(
        self, frames: CloudLike | Iterable[CloudLike], batch_frames: int
    ) -> Iterator[ScannedFrame]:
        cuts = self._cut_each(frames)
        while batch := list(itertools.islice(cuts, batch_frames)):
            names = iter(self.namer([cloud for cut in batch for cloud in cut.clusters]))
            for cut in batch:
                frame = self._named(cut, [next(names) for _ in cut.clusters])
                if self.folder is not None and frame.segments is not None:
                    self.folder.write(frame)
                yield frame

    def _cut_each(self, frames: CloudLike | Iterable[CloudLike]) -> Iterator[_Cut]:
        """Read the frames and cut them into clusters; those finished are read from the folder.

        With poses, the finished frames right before one that is not are cut as well: their points
        are accumulated.
        """
        waiting: deque[tuple[int, str, CloudLike, ScannedFrame]] = deque(maxlen=self.config.window)
        for index, (name, item) in enumerate(named(frames, self.refuse)):
            try:
                finished = None if self.folder is None else self.folder.finished(index, name, item)
                if finished is None:
                    while waiting and self.tracker is not None:
                        self._cut(*waiting.popleft())
                    cut = self._cut(index, name, item)
                else:
                    cut = _Cut(finished, [], [], [])
            except (InputError, MissingPackageError) as error:
                self.refuse(name, error)
                continue
            if finished is not None:
                waiting.append((index, name, item, finished))
                if self.tracker is not None:
                    self.tracker.reserve(box.track for box in finished.boxes)
            yield cut

    def _cut(
        self, index: int, name: str, item: CloudLike, finished: ScannedFrame | None = None
    ) -> _Cut:
        """Read a frame and cut it into clusters, with poses those of earlier frames in addition.

        Args:
            index: of the frame among all.
            name: of the frame.
            item: what it is read from.
            finished: the frame as an earlier run left it, whose objects keep their numbers.
        """
        cloud = self.options.read(item, name)
        up = cloud.assumed.up or "z"
        cloud = cloud.assuming(
            units=(cloud.assumed.units or "m") if self.units == AUTO else self.units
        )
        scale = METRES.get(cloud.assumed.units or "", 1.0)  # degrees stay, and are noted
        xyz = to_up(cloud.xyz * scale, up, "z")
        segments = segment(replace(cloud, xyz=xyz), self.config)
        frame = ScannedFrame.unnamed(name, cloud, segments)
        own = [segments.cloud.take(members) for members in segments.members()]
        shapes = [cluster.xyz for cluster in own]
        if self.tracker is None or self.poses is None:
            return _Cut(frame, own, shapes, [None] * len(own))
        known = None
        if finished is not None and len(finished.boxes) == len(own):
            known = [box.track for box in finished.boxes]
        pose = self.poses.matrices[index] @ from_turned(up)
        tracks = self.tracker.update(shapes, pose, known)
        dense = [Cloud(xyz, None, name) for _, xyz in tracks]
        notices = (*frame.notices, *self._about_poses(index, self.tracker, self.poses))
        frame = replace(frame, pose=pose, notices=notices)
        return _Cut(frame, dense, shapes, [number for number, _ in tracks])

    def _about_poses(self, index: int, tracker: Tracker, poses: Poses) -> tuple[str, ...]:
        """What was assumed of the poses, said with the first frame, and doubts, with the last."""
        said = poses.notices if index == 0 else ()
        followed, possible = tracker.n_followed, tracker.n_possible
        if index + 1 < len(poses.matrices) or followed >= FOLLOWED * possible:
            return said
        return (
            *said,
            f"only {followed} of {possible} objects continue in the next frame: the poses may be "
            "those of other frames",
        )

    def _named(self, cut: _Cut, names: Sequence[Name]) -> ScannedFrame:
        """The frame with its boxes."""
        segments = cut.frame.segments
        if segments is None or not names:
            return cut.frame
        grounds = _ground_below(segments)
        boxes = []
        for name, xyz, number, ground in zip(names, cut.shapes, cut.numbers, grounds):
            shape = vars(fit_box(xyz, ground))
            boxes.append(Box(**shape, **vars(name), n_points=len(xyz), track=number))
        clusters = tuple(cluster.xyz for cluster in cut.clusters)
        return replace(cut.frame, boxes=tuple(boxes), clusters=clusters)


def _ground_below(segments: Segments) -> list[float | None]:
    """The height of the ground below each cluster."""
    ground = segments.ground
    if ground is None:
        return [None] * segments.n_clusters
    return [float(ground.height[members].min()) for members in segments.members()]
