"""The clouds that ship, to adapt to and to evaluate on: objects indoors, and on roads.

``recipes/points`` samples them from the surfaces of 3D models, whose authors NOTICE names. The
indoor part is everyday objects and electronic parts. It has two files since licences differ:
furniture (CC-BY 3.0 and CC0) and parts (CC-BY-SA 4.0). The road part is parametric models of ours.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from budwood import catalogue
from budwood.errors import InputError, UnknownNameError

FOLDER = Path(__file__).parent
PARTS = catalogue.CLOUDS
GROUPS = ("seen", "unseen", "novel")
USES = ("adapt", "val", "test")
LEVELS = 1023
"""Coordinates are stored in 10 bits: steps of 0.2 % of the radius."""


@dataclass(frozen=True)
class Split:
    """The class of a cloud, and its part in adaptation.

    Attributes:
        label: its class.
        group: of the class: ``"seen"`` in adaptation, ``"unseen"`` in adaptation but seen in
            pretraining, or ``"novel"``, seen in neither.
        use: ``"adapt"``, ``"val"`` or ``"test"``; only seen classes have the first two.
    """

    label: str
    group: str
    use: str


@dataclass(frozen=True, eq=False)
class CloudSet:
    """Clouds with their classes.

    Attributes:
        xyz: centred, the largest norm 1, y up, float32, shape (n_clouds, n_points, 3).
        about: class and part of each cloud.
    """

    xyz: NDArray[np.float32]
    about: tuple[Split, ...]

    def __len__(self) -> int:
        return len(self.about)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each cloud, in order."""
        return tuple(split.label for split in self.about)

    @property
    def classes(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))

    def where(self, *, group: str | None = None, use: str | None = None) -> CloudSet:
        """Select the clouds of a group and a use; None is any.

        Raises:
            UnknownNameError: there is no such group or use.
        """
        for name, value, known in (("group", group, GROUPS), ("use", use, USES)):
            if value is not None and value not in known:
                raise UnknownNameError(f"unknown {name} {value!r}; give one of {', '.join(known)}")
        kept = [
            i
            for i, split in enumerate(self.about)
            if group in (None, split.group) and use in (None, split.use)
        ]
        return CloudSet(self.xyz[kept], tuple(self.about[i] for i in kept))


def load_clouds(paths: Sequence[Path] | None = None, *, part: str = "indoor") -> CloudSet:
    """Load the clouds that ship, or files that :func:`write_clouds` wrote.

    Args:
        paths: files; None for those that ship.
        part: of those that ship: ``"indoor"``, ``"road"``, or ``"both"`` as one set. A class of
            both parts then counts as seen if it is seen in one.

    Raises:
        UnknownNameError: there is no such part.
        InputError: a file is missing or truncated, or holds something else.
    """
    parts = parts_of(part)
    shipped = [FOLDER / name for one in parts for name in PARTS[one]]
    sets = [_read(Path(path)) for path in (shipped if paths is None else paths)]
    xyz = np.concatenate([one.xyz for one in sets])
    about = tuple(split for one in sets for split in one.about)
    return CloudSet(xyz, about if len(parts) == 1 else _one_group_each(about))


def parts_of(part: str) -> tuple[str, ...]:
    """The parts that a name means: itself, or all of them.

    Raises:
        UnknownNameError: there is no such part.
    """
    if part not in catalogue.CLOUD_PARTS:
        known = ", ".join(catalogue.CLOUD_PARTS)
        raise UnknownNameError(f"unknown part {part!r}; give one of {known}")
    return (part,) if part in PARTS else tuple(PARTS)


def _one_group_each(about: tuple[Split, ...]) -> tuple[Split, ...]:
    """The same with one group for each class: the first in `GROUPS` of those that it has."""
    groups: dict[str, str] = {}
    for one in about:
        groups[one.label] = min(one.group, groups.get(one.label, one.group), key=GROUPS.index)
    return tuple(replace(one, group=groups[one.label]) for one in about)


def write_clouds(path: Path, xyz: NDArray[np.floating], about: Sequence[Split]) -> None:
    """Write clouds with coordinates of 10 bits; an existing file is replaced.

    Args:
        path: a .npz file.
        xyz: in [−1, 1], shape (n_clouds, n_points, 3); the order of points is not kept.
        about: class and part of each cloud.
    """
    np.savez_compressed(
        path,
        points=_pack(xyz),
        label=np.array([split.label for split in about]),
        group=np.array([split.group for split in about]),
        use=np.array([split.use for split in about]),
    )


def _read(path: Path) -> CloudSet:
    if not path.is_file():
        raise InputError(f"the clouds {path} are missing; recipes/points makes them")
    try:
        # NumPy would leave a truncated file open that it opened itself.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            columns = zip(*(file[key].tolist() for key in ("label", "group", "use")))
            about = tuple(Split(*row) for row in columns)
            xyz = _unpack(file["points"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is truncated or holds no clouds: {error}") from None
    if len(xyz) != len(about):
        raise InputError(f"{path} has {len(xyz)} clouds and {len(about)} labels")
    return CloudSet(xyz, about)


def _pack(xyz: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Pack coordinates as sorted codes of 30 bits and their differences, which deflate well.

    Returns:
        Shape (4, n_clouds, n_points).
    """
    steps = np.round((np.clip(xyz, -1, 1) + 1) / 2 * LEVELS).astype(np.uint32)
    codes = np.sort(steps[..., 0] << 20 | steps[..., 1] << 10 | steps[..., 2], axis=1)
    gaps = np.diff(codes, axis=1, prepend=np.uint32(0))
    return np.stack([(gaps >> shift & 255).astype(np.uint8) for shift in (0, 8, 16, 24)])


def _unpack(planes: NDArray[np.uint8]) -> NDArray[np.float32]:
    gaps = sum(plane.astype(np.uint32) << shift for plane, shift in zip(planes, (0, 8, 16, 24)))
    codes = np.cumsum(gaps, axis=1, dtype=np.uint32)
    steps = np.stack([codes >> 20, codes >> 10 & 1023, codes & 1023], axis=-1)
    return (steps.astype(np.float32) / LEVELS * 2 - 1).astype(np.float32)
