"""Scans: .las and .laz by laspy, .pcd by pypcd4."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from budwood.errors import InputError
from budwood.points.io.cloud import Cloud, make_cloud
from budwood.points.io.options import ReadOptions


def need(module: str, what: str) -> Any:
    """Import an optional library.

    Raises:
        InputError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{what} needs {module}: pip install 'budwood[points]'") from None


def damaged(path: Path, error: BaseException) -> InputError:
    """The error for a file that a library failed on."""
    lines = str(error).strip().splitlines()
    return InputError(f"{path} is truncated or damaged: {lines[0] if lines else type(error)}")


def read_las(path: Path, options: ReadOptions) -> Cloud:
    """LAS and LAZ, with scaled coordinates; colours where the point format has them."""
    laspy = need("laspy", f"reading {path.suffix}")
    try:
        data = laspy.read(path)
        xyz = np.stack([np.asarray(data.x), np.asarray(data.y), np.asarray(data.z)], axis=1)
        names = set(data.point_format.dimension_names)
        rgb = None
        if {"red", "green", "blue"} <= names:
            rgb = np.stack([np.asarray(data[name]) for name in ("red", "green", "blue")], axis=1)
        n_declared = data.header.point_count
    except Exception as error:  # the formats' libraries raise what their parsers happen to
        raise damaged(path, error) from None
    if len(xyz) != n_declared:
        raise InputError(f"{path} is truncated: {len(xyz)} of {n_declared} points")
    if rgb is not None and not rgb.any():
        rgb = None  # the format has room for colours, and nothing wrote any
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)


def read_pcd(path: Path, options: ReadOptions) -> Cloud:
    """PCD, ascii and binary; an ``rgb`` field is unpacked."""
    pypcd4 = need("pypcd4", "reading .pcd")
    try:
        data = pypcd4.PointCloud.from_path(path)
        fields = data.fields
        if not {"x", "y", "z"} <= set(fields):
            raise InputError(f"{path} has fields {', '.join(fields)}; expected x, y and z")
        xyz = data.numpy(("x", "y", "z"))
        rgb = None
        if "rgb" in fields:
            rgb = data.decode_rgb(np.ascontiguousarray(data.numpy(("rgb",)), dtype=np.float32))
        n_declared = data.points
    except InputError:
        raise
    except Exception as error:
        raise damaged(path, error) from None
    if len(xyz) != n_declared:
        raise InputError(f"{path} is truncated: {len(xyz)} of {n_declared} points")
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)
