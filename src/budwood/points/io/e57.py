"""Terrestrial scans in ASTM's exchange format: .e57, by pye57."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import (
    NO_RETURN,
    Cloud,
    ReadOptions,
    damaged,
    make_cloud,
    some_colored,
)
from budwood.points.io.fields import colors_of, from_fields


def read_e57(path: Path, options: ReadOptions) -> Cloud:
    """Read all scans of a file, each at its pose, without the points that are marked invalid.

    Colours are used if all scans have them.
    """
    pye57 = need("pye57", "reading .e57")
    try:
        with pye57.E57(str(path)) as file:
            scans = [_scan(file, index) for index in range(file.scan_count)]
            n_declared = sum(file.get_header(index).point_count for index in range(len(scans)))
    except Exception as error:  # the library raises what its parsers happen to
        raise damaged(path, error) from None
    if not scans:
        raise InputError(f"{path} has no scans")
    shared = set.intersection(*(set(scan) for scan in scans))
    fields = {name: np.concatenate([scan[name] for scan in scans]) for name in shared}
    xyz, rgb = from_fields(fields, str(path))
    cloud = make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)
    n_colored = sum(colors_of(scan, str(path)) is not None for scan in scans)
    cloud = cloud.noting(some_colored(n_colored, len(scans), "scans") if rgb is None else None)
    n_invalid = n_declared - len(xyz)
    if not n_invalid:
        return cloud
    dropped = {**cloud.assumed.dropped}
    dropped[NO_RETURN] = dropped.get(NO_RETURN, 0) + n_invalid
    return cloud.assuming(dropped=dropped)


def _scan(file: Any, index: int) -> dict[str, Any]:
    return file.read_scan(index, colors=True, ignore_missing_fields=True)
