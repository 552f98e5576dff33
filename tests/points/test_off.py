"""OFF files and their colours, and colours that only a part of a file has."""

from __future__ import annotations

import numpy as np
import pytest

from budwood.errors import InputError
from budwood.points.io import read

trimesh = pytest.importorskip("trimesh")

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
RED, BLUE = np.array([1.0, 0, 0]), np.array([0, 0, 1.0])


def save_off(folder, vertices="{} {} {}", faces=(), kind="OFF"):
    """A square, its rows in a form, with faces as they stand."""
    rows = [vertices.format(*corner, i=i) for i, corner in enumerate(SQUARE)]
    path = folder / "a.off"
    path.write_text("\n".join([kind, f"4 {len(faces)} 0", *rows, *faces]) + "\n")
    return path


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("COFF", "{} {} {} 255 0 0 255"),
        ("OFF", "{} {} {} 255 0 0  # by hand"),
        ("COFF", "{} {} {} 1.0 0.0 0.0 1.0"),
        ("COFF", "{} {} {} 1 0 0 1"),
        ("CNOFF", "{} {} {} 0 0 -1 255 0 0 255"),
    ],
)
def test_colours_of_vertices(kind, row, tmp_path):
    cloud = read(save_off(tmp_path, row, kind=kind))
    np.testing.assert_array_equal(cloud.xyz, SQUARE)
    np.testing.assert_allclose(cloud.rgb, [RED] * 4, atol=1e-6)
    mesh = read(save_off(tmp_path, row, ["4 0 1 2 3"], kind), n_points=50)
    np.testing.assert_allclose(mesh.rgb, [RED] * 50, atol=1e-6)


def test_colours_between_vertices(tmp_path):
    path = save_off(tmp_path, "{0} {1} {2} {0} 0 {1}", ["3 0 1 2", "3 0 2 3"], "COFF")
    cloud = read(path, n_points=50)
    np.testing.assert_allclose(cloud.rgb[:, [0, 2]], cloud.xyz[:, :2], atol=1e-6)


@pytest.mark.parametrize(
    "faces",
    [
        ["3 0 1 2 255 0 0", "3 0 2 3 0 0 255"],
        ["3 0 1 2 1.0 0.0 0.0 0.5", "3 0 2 3 0.0 0.0 1.0 0.5"],
        ["2 0 1 9 9 9", "3 0 1 2 255 0 0", "3 0 2 3 0 0 255"],
    ],
)
def test_colours_of_faces(faces, tmp_path):
    cloud = read(save_off(tmp_path, faces=faces), n_points=200)
    below = cloud.xyz[:, 1] < cloud.xyz[:, 0]
    assert 50 < below.sum() < 150
    np.testing.assert_allclose(cloud.rgb, np.where(below[:, None], RED, BLUE), atol=1e-6)


def test_colours_of_faces_with_many_corners(tmp_path):
    # A triangle, a square, and a pentagon side by side, the last first.
    corners = [[2, 0], [3, 0], [2, 1], [0, 0], [1, 0], [1, 1], [0, 1]]
    corners += [[4, 0], [5, 0], [5, 1], [4.5, 1.5], [4, 1]]
    rows = [f"{x} {y} 0" for x, y in corners]
    faces = ["5 7 8 9 10 11 255 0 0", "4 3 4 5 6 0 255 0", "3 0 1 2"]
    (tmp_path / "a.off").write_text("\n".join(["OFF", "12 3 0", *rows, *faces]) + "\n")
    cloud = read(tmp_path / "a.off", n_points=300)
    for low, high, color in [(0, 1, (0, 1, 0)), (2, 3, (0.4, 0.4, 0.4)), (4, 5, (1, 0, 0))]:
        here = (cloud.xyz[:, 0] >= low) & (cloud.xyz[:, 0] <= high)
        assert here.sum() > 30
        np.testing.assert_allclose(cloud.rgb[here], [color] * here.sum(), atol=1e-6)


def test_off_without_colours(tmp_path):
    for kind, row in [("OFF", "{} {} {}"), ("NOFF", "{} {} {} 0 0 1"), ("OFF", "{} {} {} 0 0 -1")]:
        assert read(save_off(tmp_path, row, kind=kind)).rgb is None
        assert read(save_off(tmp_path, row, ["3 0 1 2", "3 0 2 3 5"], kind), n_points=9).rgb is None


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("OFF", "{} {} {} 0 0 1"),
        ("OFF", "{} {} {} 0.1 0.2 0.3"),
        ("OFF", "{} {} {} 1000 2000 70000"),
        ("COFF", "{} {} {} 255 0 70000"),
        ("OFF", "{} {} {} a b c"),
    ],
)
def test_values_that_are_no_colours(kind, row, tmp_path):
    cloud = read(save_off(tmp_path, row, kind=kind))
    np.testing.assert_array_equal(cloud.xyz, SQUARE)
    assert cloud.rgb is None and "no colours, and these are not used" in cloud.assumed.notes[0]
    mesh = read(save_off(tmp_path, row, ["4 0 1 2 3"], kind), n_points=50)
    assert mesh.rgb is None and mesh.assumed.notes == cloud.assumed.notes


def test_colours_that_only_some_clouds_have(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.PointCloud(SQUARE, colors=[[255, 0, 0, 255]] * 4))
    scene.export(tmp_path / "one.glb")
    assert read(tmp_path / "one.glb").assumed.notes == ()
    scene.add_geometry(trimesh.PointCloud(SQUARE + 5.0))
    scene.export(tmp_path / "two.glb")
    cloud = read(tmp_path / "two.glb")
    assert cloud.rgb is None
    assert cloud.assumed.notes == ("1 of 2 parts have colours, so none are used",)


def test_colours_that_only_some_scans_have(tmp_path):
    pye57 = pytest.importorskip("pye57")
    path = tmp_path / "a.e57"
    file = pye57.E57(str(path), mode="w")
    fields = {f"cartesian{name}": SQUARE[:, at] + 0.5 for at, name in enumerate("XYZ")}
    colors = {f"color{name}": np.full(4, 9, np.uint8) for name in ("Red", "Green", "Blue")}
    for scan in (fields, fields | colors, fields):
        file.write_scan_raw(scan, rotation=np.array([1.0, 0, 0, 0]), translation=np.zeros(3))
    file.close()
    cloud = read(path)
    assert len(cloud) == 12 and cloud.rgb is None
    assert cloud.assumed.notes == ("1 of 3 scans have colours, so none are used",)


@pytest.mark.parametrize(
    ("faces", "reason"),
    [
        (["3 0 1"], "a face has 2 of 3 corners"),
        (["-1 0 1"], "a face has 0 of -1 corners"),
        (["3 0 1 x"], "is truncated or damaged"),
        (["3 0 1 99999999999999999999"], "is truncated or damaged"),
        (["3 0 1 4"], "a face names a vertex that is not there"),
        (["3 0 1 -1"], "a face names a vertex that is not there"),
    ],
)
def test_damaged_faces(faces, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        read(save_off(tmp_path, faces=faces))
    with pytest.raises(InputError, match="is truncated or damaged"):
        read(save_off(tmp_path, "{} {}"))


def test_the_same_surface_as_by_trimesh(tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=2)
    for suffix in ("off", "stl"):
        ball.export(tmp_path / f"a.{suffix}")
    off, stl = (read(tmp_path / f"a.{suffix}", n_points=99) for suffix in ("off", "stl"))
    np.testing.assert_allclose(off.xyz, stl.xyz, atol=1e-6)
