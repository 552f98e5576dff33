"""Scans and airborne surveys: .las and .laz, by laspy."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import Cloud, ReadOptions, damaged, make_cloud
from budwood.points.io.units import METRES

# Bytes of the headers of LAS 1.4 and of the oldest, and of a record before and behind the points.
LAS_HEADER, LAS_HEADER_MIN = 375, 227
LAS_RECORD, LAS_LATE_RECORD = 54, 60
MODEL_TYPE, GEOGRAPHIC_TYPE, GEOGRAPHIC = 1024, 2048, 2  # GeoTIFF keys, and a value of the first
LENGTHS, HEIGHTS = 3076, 4099  # GeoTIFF keys of the units
EPSG_UNITS = {9001: "m", 9002: "ft", 9003: "us-ft"}
SAME_UNIT = 1e-7
"""How far two lengths of one unit are apart in texts, relative to it; both feet differ by 2e-6."""
IN_DEGREES = (
    "its coordinate system is of degrees, so the shape is squeezed; project it to metres first, "
    "for example to UTM"
)
WITHHELD = "withheld"
"""Reason to leave a point out: its flag says that it counts as deleted."""
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
            in_degrees = _is_geographic(reader.header)
            units, height_units = _units(reader.header)
        xyz = np.stack([np.asarray(data.x), np.asarray(data.y), np.asarray(data.z)], axis=1)
        names = set(data.point_format.dimension_names)
        rgb = None
        if {"red", "green", "blue"} <= names:
            rgb = np.stack([np.asarray(data[name]) for name in ("red", "green", "blue")], axis=1)
        withheld = np.asarray(data.withheld, dtype=bool)
        n_declared = data.header.point_count
    except InputError:
        raise
    except Exception as error:  # the formats' libraries raise what their parsers happen to
        raise damaged(path, error) from None
    if len(xyz) != n_declared:
        raise InputError(f"{path} is truncated: {len(xyz)} of {n_declared} points")
    if rgb is not None and not rgb.any():
        rgb = None  # the point format has colours, but the writer filled in none
    if withheld.all():
        raise InputError(f"{path}: all points are marked as withheld, which means deleted")
    rgb = None if rgb is None else rgb[~withheld]
    cloud = make_cloud(xyz[~withheld], rgb, source=str(path), invalid=options.invalid)
    if withheld.any():
        dropped = {**cloud.assumed.dropped, WITHHELD: int(withheld.sum())}
        cloud = cloud.assuming(dropped=dropped)
    if in_degrees:
        return cloud.assuming(units="degrees", notes=(IN_DEGREES,))
    if units != height_units:
        cloud = cloud.noting(
            f"its coordinate system has x and y in {units} and heights in {height_units}, so the "
            "shape is stretched; convert it to one unit"
        )
    return cloud.assuming(units=units)


def _is_geographic(header: Any) -> bool:
    """Whether the coordinate system is one of degrees, by its GeoTIFF keys or its WKT."""
    for record in (*header.vlrs, *(header.evlrs or ())):
        keys = {key.id: key.value_offset for key in getattr(record, "geo_keys", ())}
        if keys.get(MODEL_TYPE, GEOGRAPHIC if GEOGRAPHIC_TYPE in keys else 0) == GEOGRAPHIC:
            return True
        text = str(getattr(record, "string", "")).upper()
        if "GEOGC" in text and "PROJC" not in text:  # GEOGCS or GEOGCRS, PROJCS or PROJCRS
            return True
    return False


def _units(header: Any) -> tuple[str, str]:
    """Units of x and y, and of heights, by GeoTIFF keys or WKT; metres where nothing is said."""
    along, up = None, None
    for record in (*header.vlrs, *(header.evlrs or ())):
        keys = {key.id: key.value_offset for key in getattr(record, "geo_keys", ())}
        along = along or EPSG_UNITS.get(keys.get(LENGTHS, 0))
        up = up or EPSG_UNITS.get(keys.get(HEIGHTS, 0))
        text = str(getattr(record, "string", ""))
        flat, _, vertical = re.sub(r"VERT(_CS|CRS)", "\0VERT", text, flags=re.I).partition("\0")
        along, up = along or _last_length(flat), up or _last_length(vertical)
    along = along or "m"
    return along, up or along


def _last_length(wkt: str) -> str | None:
    """The unit of length that WKT names last: that of the axes, and not that of the ellipsoid."""
    found = re.findall(r'(?:LENGTH)?UNIT\s*\[\s*"([^"]*)"\s*,\s*([0-9.eE+-]+)', wkt, re.I)
    lengths = [float(size) for name, size in found if "deg" not in name.lower()]
    if not lengths:
        return None
    near = (name for name, size in METRES.items() if abs(lengths[-1] / size - 1) < SAME_UNIT)
    return next(near, None)


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
