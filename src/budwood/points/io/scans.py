"""Scans: .las and .laz by laspy, .pcd by pypcd4."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import Cloud, ReadOptions, damaged, make_cloud

# Bytes of the headers of LAS 1.4 and of the oldest, and of a record before and behind the points.
LAS_HEADER, LAS_HEADER_MIN = 375, 227
LAS_RECORD, LAS_LATE_RECORD = 54, 60
LAZ_VARIABLE = 2**32 - 1  # chunks of different numbers of points
LAZ_CHUNK_MAX = 2**24  # points; writers take 50,000


def read_las(path: Path, options: ReadOptions) -> Cloud:
    """Read LAS and LAZ: scaled coordinates, and colours where the point format has them."""
    laspy = need("laspy", f"reading {path.suffix}")
    _check_records(path)
    try:
        with laspy.open(path) as reader:
            _check_points(path, reader.header)
            data = reader.read()
        xyz = np.stack([np.asarray(data.x), np.asarray(data.y), np.asarray(data.z)], axis=1)
        names = set(data.point_format.dimension_names)
        rgb = None
        if {"red", "green", "blue"} <= names:
            rgb = np.stack([np.asarray(data[name]) for name in ("red", "green", "blue")], axis=1)
        n_declared = data.header.point_count
    except InputError:
        raise
    except Exception as error:  # the formats' libraries raise what their parsers happen to
        raise damaged(path, error) from None
    if len(xyz) != n_declared:
        raise InputError(f"{path} is truncated: {len(xyz)} of {n_declared} points")
    if rgb is not None and not rgb.any():
        rgb = None  # the point format has colours, but the writer filled in none
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)


def read_pcd(path: Path, options: ReadOptions) -> Cloud:
    """Read PCD, ascii and binary; an ``rgb`` or ``rgba`` field is unpacked."""
    pypcd4 = need("pypcd4", "reading .pcd")
    try:
        data = pypcd4.PointCloud.from_path(path)
        fields = data.fields
        if not {"x", "y", "z"} <= set(fields):
            raise InputError(f"{path} has fields {', '.join(fields)}; expected x, y and z")
        xyz = data.numpy(("x", "y", "z"))
        name = next((name for name in ("rgb", "rgba") if name in fields), None)
        rgb = None if name is None else unpack_colors(data.pc_data[name])
        n_declared = data.points
    except InputError:
        raise
    except Exception as error:
        raise damaged(path, error) from None
    if len(xyz) != n_declared:
        raise InputError(f"{path} is truncated: {len(xyz)} of {n_declared} points")
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)


def unpack_colors(packed: NDArray[Any]) -> NDArray[np.uint8]:
    """Unpack colours of PCD: 0xRRGGBB or 0xAARRGGBB in the bits of a float, or in an integer.

    Args:
        packed: shape (n_points,).

    Returns:
        red, green and blue, shape (n_points, 3).
    """
    packed = np.atleast_1d(packed)
    if packed.dtype.kind == "f":
        bits = packed.astype(np.float32).view(np.uint32)
    else:
        bits = packed.astype(np.uint32)
    return np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], axis=1).astype(np.uint8)


# Compare what a LAS or LAZ header declares with the size of the file. laspy and lazrs trust the
# header: a damaged count keeps them busy for hours, or uses up the memory. -----------------------


def _check_records(path: Path) -> None:
    """Check the number of variable length records, at the offsets of the LAS specification."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(LAS_HEADER)
    if len(head) < LAS_HEADER_MIN or head[:4] != b"LASF":
        raise InputError(f"{path} is truncated or no LAS file")
    n_records = struct.unpack_from("<I", head, 100)[0]
    least = LAS_RECORD * n_records
    if head[25] >= 4 and len(head) == LAS_HEADER:  # since 1.4 there are some behind the points
        least += LAS_LATE_RECORD * struct.unpack_from("<I", head, 243)[0]
    if least > size:
        raise InputError(f"{path} is truncated or damaged: {size} bytes for {least} of records")


def _check_points(path: Path, header: Any) -> None:
    """Check the number of points, and for LAZ the chunks that they are packed in."""
    size = path.stat().st_size
    n_points, start, width = (
        header.point_count,
        header.offset_to_point_data,
        header.point_format.size,
    )
    if not header.are_points_compressed:
        n_present = max(0, size - start) // width
        if n_present < n_points:
            raise InputError(f"{path} is truncated: {n_present} of {n_points} points")
        return
    chunk = struct.unpack_from("<I", header.vlrs.get("LasZipVlr")[0].record_data, 12)[0]
    with path.open("rb") as file:
        file.seek(start)
        table = struct.unpack("<q", file.read(8))[0]
        if table == -1:  # a writer that could not go back put it at the end
            file.seek(-8, os.SEEK_END)
            table = struct.unpack("<q", file.read(8))[0]
        file.seek(table)
        n_chunks = struct.unpack("<4xI", file.read(8))[0]
    variable = chunk == LAZ_VARIABLE
    if n_chunks * width > size:  # each begins with a whole point
        raise InputError(f"{path} is truncated or damaged: {size} bytes for {n_chunks} chunks")
    if not variable and (chunk > max(n_points, LAZ_CHUNK_MAX) or n_points > n_chunks * chunk):
        raise InputError(
            f"{path} is truncated or damaged: {n_points} points in {n_chunks} chunks of {chunk}"
        )
