"""From files, folders, arrays and clouds to what an encoder takes, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError, MissingPackageError, first_line
from budwood.points.io import Cloud, ReadOptions, crop, find_files, make_cloud, read
from budwood.points.io.cloud import corners
from budwood.points.io.tables import split_columns
from budwood.points.sampling import SAMPLERS, check_draw, check_up

if TYPE_CHECKING:
    from budwood.points.encoders.base import PointEncoder, PreparedCloud

CloudLike = str | os.PathLike[str] | Cloud | Any
"""A file, a folder (all of its clouds), a :class:`Cloud`, an array or tensor of shape (n_points, 3)
or (n_points, 6) with colours or normals, or what :meth:`PointEncoder.prepare` returned, without
options that it cannot follow. Give several tensors as a list: a tuple of two can be a prepared
cloud."""

OnError = Callable[[str, Exception], object]
"""Called with the name of a cloud that cannot be used, and the reason."""


@dataclass(frozen=True)
class InputOptions:
    """How files, arrays and clouds are read and prepared.

    Attributes:
        points: points to keep of each cloud, 2 or more; default as many as in the encoder's
            training.
        sampler: how they are chosen, a name in ``SAMPLERS``.
        up: ``"y"`` or ``"z"``: the axis of the clouds that points up.
        columns: letters of the columns of tables and arrays, such as ``"xyz_rgb"``.
        box: x0, y0, z0, x1, y1, z1 in the units of the file: keep the points inside.
        invalid: ``"error"``, or ``"drop"`` to leave out points with NaN or infinite coordinates.
        seed: of all sampling, 0 or more.

    Raises:
        InputError: a value outside its range.
        UnknownNameError: no such sampler.
    """

    points: int | None = None
    sampler: str = "random"
    up: str = "y"
    columns: str | None = None
    box: Sequence[float | str] | None = None
    invalid: str = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        SAMPLERS.get(self.sampler)
        check_up(self.up)
        check_draw(2 if self.points is None else self.points, self.seed, least=2)
        ReadOptions(columns=self.columns, invalid=self.invalid, seed=self.seed)
        if self.box is not None:
            corners(self.box)

    def read(self, item: CloudLike, name: str = "cloud") -> Cloud:
        """Read one file, array or cloud.

        Args:
            item: what to read.
            name: name of an array, for messages.
        """
        if isinstance(item, Cloud):
            cloud = item
        elif isinstance(item, (str, os.PathLike)):
            cloud = read(item, columns=self.columns, invalid=self.invalid, seed=self.seed)
        else:
            xyz, rgb = split_columns(_as_array(item, name), self.columns, name)
            cloud = make_cloud(xyz, rgb, source=name, invalid=self.invalid)
        return cloud if self.box is None else crop(cloud, self.box)

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


def prepare_each(
    clouds: CloudLike | Iterable[CloudLike],
    encoder: PointEncoder,
    options: InputOptions,
    on_error: OnError | None = None,
) -> Iterator[tuple[str, PreparedCloud]]:
    """Read and prepare clouds one by one, so that they need not fit into memory together.

    Args:
        clouds: one or several; see `CloudLike`.
        encoder: whose input they become.
        options: how.
        on_error: called for a cloud that cannot be used, which is then left out; default: raise.

    Yields:
        The name of each cloud, and its xyz and rgb.

    Raises:
        InputError: a cloud is unusable, and there is no ``on_error``.
        MissingPackageError: the library for a format is not installed, as above.
    """
    refuse = _raise if on_error is None else on_error
    for name, item in named(clouds, refuse):
        try:
            if _is_prepared(item):
                options.check_unused(name)
                source, prepared = name, cast("PreparedCloud", item)
            else:
                cloud = options.read(item, name)
                source, prepared = cloud.source, options.prepare(cloud, encoder)
        except (InputError, MissingPackageError) as error:
            refuse(name, error)
            continue
        yield source, prepared


def _raise(name: str, error: Exception) -> None:
    raise error


def is_one_cloud(clouds: Any) -> bool:
    """Whether this is one cloud, file or folder, and not several of them."""
    one = isinstance(clouds, (str, os.PathLike, Cloud)) or getattr(clouds, "ndim", 0) == 2
    return one or _is_prepared(clouds)


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
    """An array of a tensor of any dtype and device, or of what NumPy reads as an array."""
    try:
        if _is_tensor(item):
            item = item.detach().cpu()
            item = item.double() if item.is_floating_point() else item  # NumPy has no bfloat16
        return np.asarray(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is not an array of numbers: {first_line(error)}") from None


def named(
    clouds: CloudLike | Iterable[CloudLike], on_error: OnError
) -> Iterator[tuple[str, CloudLike]]:
    """Name each cloud; a folder becomes its files, and one without clouds goes to ``on_error``."""
    items = [clouds] if is_one_cloud(clouds) else cast(Iterable[CloudLike], clouds)
    number = 0
    for item in items:
        if isinstance(item, (str, os.PathLike)) and Path(item).is_dir():
            try:
                files = find_files(item)
            except InputError as error:
                on_error(str(item), error)
                continue
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
