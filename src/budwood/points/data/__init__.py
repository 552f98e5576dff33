"""The clouds that ship: everyday objects and electronic parts, for adaptation and for evaluation.

Sampled from the surfaces of models by ``recipes/points``; see NOTICE for who made them. Two files,
as their licences differ: furniture (CC-BY 3.0 and CC0) and parts (CC-BY-SA 4.0).
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError

FOLDER = Path(__file__).parent
FILES = ("furniture.npz", "parts.npz")
GROUPS = ("seen", "unseen", "novel")
USES = ("adapt", "val", "test")
LEVELS = 1023
"""Coordinates have 10 bits: steps of 0.2 % of the radius."""


@dataclass(frozen=True)
class Split:
    """What is known of a cloud.

    Attributes:
        label: its class.
        group: of the class: ``"seen"`` in adaptation; ``"unseen"`` there, but in
            pretraining; or ``"novel"``, in neither.
        use: ``"adapt"``, ``"val"`` or ``"test"``; only seen classes have the first two.
    """

    label: str
    group: str
    use: str


@dataclass(frozen=True, eq=False)
class CloudSet:
    """Clouds with what is known of them.

    Attributes:
        xyz: centred, the largest norm 1, y up, float32, shape (n_clouds, n_points, 3).
        about: one for each.
    """

    xyz: NDArray[np.float32]
    about: tuple[Split, ...]

    def __len__(self) -> int:
        return len(self.about)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, sorted."""
        return tuple(sorted({one.label for one in self.about}))

    def where(self, *, group: str | None = None, use: str | None = None) -> CloudSet:
        """Those of a group and of a use; None is any."""
        kept = [
            i
            for i, one in enumerate(self.about)
            if group in (None, one.group) and use in (None, one.use)
        ]
        return CloudSet(self.xyz[kept], tuple(self.about[i] for i in kept))


def load_clouds(paths: Sequence[Path] | None = None) -> CloudSet:
    """The clouds that ship, or those of other files of their kind.

    Raises:
        InputError: a file is missing, truncated or of another content.
    """
    files = [FOLDER / name for name in FILES] if paths is None else list(paths)
    parts = [_read(path) for path in files]
    xyz = np.concatenate([part.xyz for part in parts])
    return CloudSet(xyz, tuple(one for part in parts for one in part.about))


def write_clouds(path: Path, xyz: NDArray[np.floating], about: Sequence[Split]) -> None:
    """Write clouds, coordinates in 10 bits each; an existing file is replaced.

    Args:
        path: a .npz file.
        xyz: in [−1, 1], shape (n_clouds, n_points, 3); the order of points is not kept.
        about: one for each.
    """
    np.savez_compressed(
        path,
        points=_pack(xyz),
        label=np.array([one.label for one in about]),
        group=np.array([one.group for one in about]),
        use=np.array([one.use for one in about]),
    )


def _read(path: Path) -> CloudSet:
    if not path.is_file():
        raise InputError(f"the clouds {path} are missing; recipes/points makes them")
    try:
        # Opened here: NumPy leaves what it opens itself unclosed where it is truncated.
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
    """Codes of 30 bits, sorted, their differences by bytes: what deflate makes little of.

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
