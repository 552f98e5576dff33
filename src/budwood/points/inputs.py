"""From files, folders, arrays and clouds to what an encoder takes, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from budwood.checks import need_bool
from budwood.errors import InputError, MissingPackageError, first_line
from budwood.notices import warn_user
from budwood.points.axes import AUTO, check_up
from budwood.points.cleaning import without_ground, without_strays
from budwood.points.io import (
    Assumed,
    Cloud,
    ReadOptions,
    cloud_of,
    crop,
    find_files,
    make_cloud,
    read,
    unknown_files,
)
from budwood.points.io.cloud import corners
from budwood.points.sampling import SAMPLERS, check_draw, without_duplicates

if TYPE_CHECKING:
    from budwood.points.encoders.base import PointEncoder, PreparedCloud

CloudLike = str | os.PathLike[str] | Cloud | Any
"""A file, a folder (all of its clouds), a :class:`Cloud`, an array or tensor of shape (n_points, 3)
or with more columns, a structured array with fields x, y and z, or what
:meth:`PointEncoder.prepare` returned, without options that it cannot follow. Give several tensors
as a list: a tuple of two can be a prepared cloud."""

OnError = Callable[[str, Exception], object]
"""Called with the name of a cloud that cannot be used, and the reason."""


@dataclass(frozen=True)
class InputOptions:
    """How files, arrays and clouds are read and prepared.

    Attributes:
        points: points to keep of each cloud, 2 or more; default as many as in the encoder's
            training, and no more than that are ever kept.
        sampler: how they are chosen, a name in ``SAMPLERS``.
        up: the axis of the clouds that points up, in ``AXES``; ``"auto"``: by the format of the
            file, z for scans, y for meshes, arrays and text.
        columns: letters of the columns of tables and arrays, such as ``"xyz_rgb"``.
        box: x0, y0, z0, x1, y1, z1 in the units of the file: keep the points inside.
        invalid: ``"error"``, or ``"drop"`` to leave out points of which one or two coordinates are
            NaN or infinite. Beams without a return (rows of NaN or zeros) are always left out.
        strays: ``"drop"`` or ``"keep"``, for a few points far from all others.
        remove_ground: leave out the ground, the lowest large plane.
        seed: of all sampling, 0 or more.

    Raises:
        InputError: a value outside its range.
        UnknownNameError: no such sampler.
    """

    points: int | None = None
    sampler: str = "random"
    up: str = AUTO
    columns: str | None = None
    box: Sequence[float | str] | None = None
    invalid: str = "error"
    strays: str = "drop"
    remove_ground: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        SAMPLERS.get(self.sampler)
        check_up(self.up, auto=True)
        check_draw(2 if self.points is None else self.points, self.seed, least=2)
        ReadOptions(columns=self.columns, invalid=self.invalid, seed=self.seed)
        if self.strays not in ("drop", "keep"):
            raise InputError(f"strays={self.strays!r} is unknown; give 'drop' or 'keep'")
        need_bool(remove_ground=self.remove_ground)
        if self.box is not None:
            corners(self.box)

    def read(self, item: CloudLike, name: str = "cloud") -> Cloud:
        """Read one file, array or cloud; then crop it, and leave out the ground and strays.

        Points at the same place count once: a sensor may write the same row for each beam without a
        return, and so many copies would count as a part of the object.

        Args:
            item: what to read.
            name: name of an array, for messages.
        """
        if isinstance(item, Cloud):
            made = make_cloud(item.xyz, item.rgb, source=item.source, invalid=self.invalid)
            dropped = {**item.assumed.dropped, **made.assumed.dropped}
            notes = tuple(dict.fromkeys((*item.assumed.notes, *made.assumed.notes)))
            cloud = replace(made, assumed=replace(item.assumed, dropped=dropped, notes=notes))
        elif isinstance(item, (str, os.PathLike)):
            cloud = read(item, columns=self.columns, invalid=self.invalid, seed=self.seed)
        else:
            cloud = cloud_of(_as_array(item, name), name, self.columns, self.invalid)
        up = (cloud.assumed.up or "y") if self.up == AUTO else self.up
        cloud = cloud.assuming(up=up)
        if self.box is not None:
            cloud = crop(cloud, self.box)
        cloud = without_duplicates(cloud)
        if self.remove_ground:
            cloud = without_ground(cloud, up, self.seed)
        return cloud if self.strays == "keep" else without_strays(cloud, self.seed)

    def check_unused(self, name: str) -> None:
        """Refuse options that a prepared cloud cannot follow; the seed is that of other clouds.

        Args:
            name: of the prepared cloud, for the message.

        Raises:
            InputError: an option has another value than its default.
        """
        for option in fields(self):
            value, default = getattr(self, option.name), option.default
            changed = value is not None if default is None else value != default
            if changed and option.name != "seed":
                raise InputError(
                    f"{name} is prepared already, and {option.name}={value!r} has no effect on it; "
                    f"leave {option.name} out, or give the cloud as it was read"
                )

    def prepare(self, cloud: Cloud, encoder: PointEncoder) -> PreparedCloud:
        """Prepare a cloud for an encoder; see :meth:`PointEncoder.prepare`."""
        return encoder.prepare(cloud, self.points, up=self.up, sampler=self.sampler, seed=self.seed)

    def note_of(self, cloud: Cloud, encoder: PointEncoder) -> str | None:
        """What to say where more points are asked for than the encoder was made for."""
        most = encoder.preparation.n_points
        if self.points is None or min(self.points, len(cloud)) <= most:
            return None
        return (
            f"{encoder.name} was made for {most:,} points and gets {most:,}, not the "
            f"{self.points:,} asked for"
        )


class Prepared(NamedTuple):
    """A cloud as an encoder takes it.

    Attributes:
        source: the file, or the name of the cloud.
        cloud: its xyz and rgb.
        assumed: what was assumed when it was read; None if it was given prepared.
    """

    source: str
    cloud: PreparedCloud
    assumed: Assumed | None = None


def prepare_each(
    clouds: CloudLike | Iterable[CloudLike],
    encoder: PointEncoder,
    options: InputOptions,
    on_error: OnError | None = None,
) -> Iterator[Prepared]:
    """Read and prepare clouds one by one, so that they need not fit into memory together.

    Warns once (:class:`InputWarning`) of each thing that may make results wrong, and of files in
    folders that are of no known format.

    Args:
        clouds: one or several; see `CloudLike`.
        encoder: whose input they become.
        options: how.
        on_error: called for a cloud that cannot be used, which is then left out; default: raise.

    Raises:
        InputError: a cloud is unusable, and there is no ``on_error``.
        MissingPackageError: the library for a format is not installed, as above.
    """
    refuse = _raise if on_error is None else on_error
    noted: set[str] = set()
    for name, item in named(clouds, refuse):
        try:
            if _is_prepared(item):
                options.check_unused(name)
                prepared = Prepared(name, _checked(cast("PreparedCloud", item), name, encoder))
            else:
                cloud = options.read(item, name)
                cloud = cloud.noting(options.note_of(cloud, encoder))
                prepared = Prepared(cloud.source, options.prepare(cloud, encoder), cloud.assumed)
        except (InputError, MissingPackageError) as error:
            refuse(name, error)
            continue
        for note in prepared.assumed.notes if prepared.assumed else ():
            if note not in noted:
                noted.add(note)
                warn_user(f"{prepared.source}: {note}")
        yield prepared


def _checked(cloud: PreparedCloud, name: str, encoder: PointEncoder) -> PreparedCloud:
    n_points, most = len(cloud[0]), encoder.preparation.n_points
    if n_points > most:
        raise InputError(
            f"{name} is prepared with {n_points:,} points, and {encoder.name} was made for "
            f"{most:,}; prepare it with fewer, or give the cloud as it was read"
        )
    return cloud


def _raise(name: str, error: Exception) -> None:
    raise error


def is_one_cloud(clouds: Any) -> bool:
    """Whether this is one cloud, file or folder, and not several of them."""
    one = isinstance(clouds, (str, os.PathLike, Cloud)) or getattr(clouds, "ndim", 0) == 2
    is_structured = getattr(getattr(clouds, "dtype", None), "names", None) is not None
    return one or is_structured or _is_prepared(clouds)


def _is_prepared(item: Any) -> bool:
    """Whether this is xyz, and rgb in [0, 1] or None, as :meth:`PointEncoder.prepare` returns."""
    if not (isinstance(item, tuple) and len(item) == 2 and _is_tensor(item[0])):
        return False
    xyz, rgb = item
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        return False
    if rgb is None:
        return True
    return _is_tensor(rgb) and rgb.shape == xyz.shape and bool(((rgb >= 0) & (rgb <= 1)).all())


def _is_tensor(item: Any) -> bool:
    return hasattr(item, "detach")  # without importing torch, which takes seconds


def _as_array(item: Any, name: str) -> NDArray[Any]:
    """An array of a tensor of any dtype and device, or of what NumPy reads as an array.

    A table of pandas goes by the names of its columns, where these are texts. Masked values count
    as missing.
    """
    try:
        if _is_tensor(item):
            item = item.detach().cpu()
            item = item.double() if item.is_floating_point() else item  # NumPy has no bfloat16
        elif hasattr(item, "to_records"):
            has_names = all(isinstance(column, str) for column in item.columns)
            item = item.to_records(index=False) if has_names else item.to_numpy()
        elif np.ma.isMaskedArray(item) and item.dtype.names is None:
            item = np.ma.filled(item.astype(np.float64), np.nan)
        return np.asarray(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is not an array of numbers: {first_line(error)}") from None


def left_out_note(unknown: Mapping[str, int]) -> str:
    """Say how many files of which suffixes in folders are of no known format."""
    kinds = ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in unknown.items())
    n_files = sum(unknown.values())
    return f"{n_files} file{'s are' if n_files > 1 else ' is'} of no known format: {kinds}"


def named(
    clouds: CloudLike | Iterable[CloudLike], on_error: OnError
) -> Iterator[tuple[str, CloudLike]]:
    """Name each cloud; a folder becomes its files, and one without clouds goes to ``on_error``."""
    items = [clouds] if is_one_cloud(clouds) else cast(Iterable[CloudLike], clouds)
    if not isinstance(items, Iterable):
        kind = type(clouds).__name__
        raise InputError(f"the clouds are of type {kind}; give files, arrays or Cloud objects")
    number = 0
    for item in items:
        if isinstance(item, (str, os.PathLike)) and Path(item).is_dir():
            try:
                files = find_files(item)
            except InputError as error:
                on_error(str(item), error)
                continue
            if left_out := unknown_files(item):
                warn_user(f"{item}: {left_out_note(left_out)}")
            for file in files:
                number += 1
                yield str(file), file
            continue
        number += 1
        if isinstance(item, Cloud):
            yield item.source, item
        elif isinstance(item, (str, os.PathLike)):
            yield str(item), item
        else:
            yield f"cloud {number}", item
