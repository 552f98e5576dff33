"""One file of every format, written the way users' tools write them."""

from __future__ import annotations

import numpy as np
import pytest

from budwood.errors import InputError
from budwood.points.io import read

XYZ = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
RGB = np.random.default_rng(1).integers(0, 256, size=(200, 3)).astype(np.uint8)

TABLES = ("npy", "npz", "bin", "xyz", "txt", "csv", "pts")
SCANS = ("las", "laz", "pcd")
MESHES = ("ply", "off", "obj", "stl", "glb", "gltf", "3mf")
FORMATS = TABLES + SCANS + MESHES


def refused(path, **kwargs):
    """The one line that says why a file is not read."""
    with pytest.raises(InputError) as caught:
        read(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def write_table(path):
    table = np.hstack([XYZ, RGB])
    if path.suffix == ".npy":
        np.save(path, table)
    elif path.suffix == ".npz":
        np.savez(path, xyz=XYZ, rgb=RGB)
    elif path.suffix == ".bin":
        np.hstack([XYZ, np.ones((200, 1))]).astype("<f4").tofile(path)
    elif path.suffix == ".csv":
        np.savetxt(path, table, delimiter=",", header="x,y,z,red,green,blue", comments="")
    elif path.suffix == ".pts":
        rows = np.hstack([XYZ, RGB[:, :1], RGB])
        np.savetxt(path, rows, fmt=["%.6f"] * 3 + ["%d"] * 4, header="200", comments="")
    else:
        np.savetxt(path, table)


def write_scan(path):
    if path.suffix == ".pcd":
        from pypcd4 import Encoding, PointCloud

        packed = PointCloud.encode_rgb(RGB).reshape(-1, 1)
        cloud = PointCloud.from_xyzrgb_points(np.hstack([XYZ, packed]))
        cloud.save(path, encoding=Encoding.BINARY)
        return
    import laspy

    header = laspy.LasHeader(point_format=3)
    header.scales = [1e-5] * 3
    data = laspy.LasData(header)
    data.x, data.y, data.z = XYZ.T.astype(np.float64)
    data.red, data.green, data.blue = RGB.T.astype(np.uint16) * 257
    data.write(path)


def write_mesh(path):
    import trimesh

    save_mesh(trimesh.creation.icosphere(subdivisions=2), path)


def save_mesh(mesh, path):
    """Write a mesh, and for .gltf the files beside it."""
    if path.suffix != ".gltf":
        mesh.export(path)
        return
    for name, content in mesh.export(file_type="gltf").items():
        target = path if name == "model.gltf" else path.with_name(f"{path.stem}-{name}")
        target.write_bytes(content.replace(b'"gltf_', f'"{path.stem}-gltf_'.encode()))


def write(path):
    name = path.suffix.removeprefix(".")
    (write_table if name in TABLES else write_scan if name in SCANS else write_mesh)(path)
    return path
