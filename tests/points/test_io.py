"""Every format, read; and every bad file, refused in one line."""

from __future__ import annotations

import contextlib
import json
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from budwood.errors import InputError, MissingPackageError
from budwood.points import read_embeddings
from budwood.points.io import READERS, crop, find_files, make_cloud, read
from budwood.points.io.mesh_colors import vertex_paint
from budwood.points.io.meshes import sample_surface
from tests.points import files
from tests.points.files import refused

pytest.importorskip("trimesh")
pytest.importorskip("laspy")
pytest.importorskip("pypcd4")


def test_files_cover_the_registry():
    without_e57 = set(READERS) - {".e57"}  # which its own library writes: test_layouts
    assert {f".{name}" for name in files.FORMATS} == without_e57


@pytest.mark.parametrize("name", files.TABLES + files.SCANS)
def test_points_come_back(name, tmp_path):
    cloud = read(files.write(tmp_path / f"cloud.{name}"))
    np.testing.assert_allclose(cloud.xyz, files.XYZ, atol=1e-4)
    if name == "bin":
        assert cloud.rgb is None
    else:
        assert cloud.rgb.dtype == np.float32
        np.testing.assert_allclose(cloud.rgb, files.RGB / 255, atol=1e-6)


@pytest.mark.parametrize("name", files.MESHES)
def test_meshes_are_sampled_with_a_seed(name, tmp_path):
    path = files.write(tmp_path / f"ball.{name}")
    cloud = read(path, n_points=500, seed=3)
    assert len(cloud) == 500
    radius = np.linalg.norm(cloud.xyz, axis=1)
    assert radius.max() <= 1.0001 and radius.min() > 0.9
    assert np.array_equal(cloud.xyz, read(path, n_points=500, seed=3).xyz)
    assert not np.array_equal(cloud.xyz, read(path, n_points=500, seed=4).xyz)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("name", files.FORMATS)
def test_truncated_files(name, share, tmp_path):
    whole = files.write(tmp_path / f"whole.{name}")
    content = whole.read_bytes()
    path = tmp_path / f"cut.{name}"
    path.write_bytes(content[: int(share * len(content)) | 1])
    # Text without counts can be cut between two rows, and OBJ between two records.
    if name in ("xyz", "txt", "csv", "obj"):
        with contextlib.suppress(InputError):
            assert 1 <= len(read(path, n_points=100)) <= 200
    else:
        refused(path)


@pytest.mark.parametrize("name", files.FORMATS)
def test_empty_and_foreign_files(name, tmp_path):
    path = tmp_path / f"a.{name}"
    path.write_bytes(b"")
    assert "is empty" in refused(path)
    path.write_bytes(bytes(range(256)) * 4 + b"x")
    refused(path)
    path.write_text("hello, this is no cloud\n")
    refused(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["npy", "npz", "bin", "txt", "csv", "ply"])
def test_nan_and_infinite_coordinates(name, bad, tmp_path, monkeypatch):
    xyz = files.XYZ.copy()
    xyz[7, 1] = bad
    path = tmp_path / f"a.{name}"
    if name == "ply":
        rows = "\n".join(" ".join(map(str, row)) for row in xyz)
        head = "ply\nformat ascii 1.0\nelement vertex 200\nproperty float x\nproperty float y\n"
        path.write_text(f"{head}property float z\nend_header\n{rows}\n")
    else:
        monkeypatch.setattr(files, "XYZ", xyz)
        files.write(path)
    message = refused(path)
    assert "1 of 200 points" in message
    assert "invalid='drop'" in message and "--drop-invalid" in message
    assert len(read(path, invalid="drop")) == 199


def test_columns(tmp_path):
    def table(width, columns=None, low=0.0):
        path = tmp_path / "a.npy"
        np.save(path, np.random.default_rng(0).uniform(low, 1, size=(9, width)))
        return read(path, columns=columns)

    assert table(3).rgb is None
    assert table(4).rgb is None
    assert table(6).rgb is not None
    assert table(6, low=-1.0).rgb is None  # normals
    assert table(7, "xyz_rgb").rgb is not None
    for width in (1, 2, 17):
        with pytest.raises(InputError, match=f"{width} columns"):
            table(width)
    with pytest.raises(InputError, match="names 6"):
        table(7, "xyzrgb")
    for columns in ("xy", "xyzz", "xyzrg", "abc"):
        with pytest.raises(InputError, match="must have x, y, z once"):
            table(3, columns)


def test_text_layouts(tmp_path):
    path = tmp_path / "a.txt"
    for text in (
        "# a comment\n1 2 3\n4 5 6\n",
        "2\n1 2 3\n4 5 6\n",
        "1,2,3\n4,5,6\n",
        "x;y;z\n1;2;3\n4;5;6\n",
        "intensity,Z,Y,X\n0,3,2,1\n0,6,5,4\n",
    ):
        path.write_text(text)
        assert read(path).xyz.tolist() == [[1, 2, 3], [4, 5, 6]], text
    path.write_text("1 2 3\n4 5\n")
    refused(path)
    path.write_text("a,b,c\n1,2,3\n")
    assert "names no columns" in refused(path)
    path.write_text("# nothing else\n")
    refused(path)


@pytest.mark.parametrize("header", ["x,y,z,r", "x,y,z,X", "x,y,z,Red", "x,y,z,r,g,b,red"])
def test_headers_that_name_columns_twice_or_one_colour(header, tmp_path):
    path = tmp_path / "a.csv"
    width = header.count(",") + 1
    path.write_text(f"{header}\n" + ",".join("123456789"[:width]) + "\n")
    message = refused(path)
    assert f"its header {header!r} must name x, y, z once" in message
    assert read(path, columns="xyz".ljust(width, "_")).xyz.tolist() == [[1, 2, 3]]


def test_a_first_line_that_counts_the_points(tmp_path):
    path = tmp_path / "a.xyz"
    rows = "1 2 3\n4 5 6\n7 8 9\n"
    path.write_text(f"# scan\n3\n{rows}")
    assert len(read(path)) == 3
    for n in (2, 9):
        path.write_text(f"{n}\n{rows}")
        assert f"declares {n} points in its first line and has 3" in refused(path)


@pytest.mark.parametrize("text", ["x,y,z\n1,2,3\n4,5,6\n", "1,2,3\n4,5,6\n", "2\n1 2 3\n4 5 6\n"])
def test_a_byte_order_mark_is_left_out(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8-sig")
    assert read(path).xyz.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_numpy_files_of_another_kind(tmp_path):
    np.savez(tmp_path / "a.npz", xyz=files.XYZ)
    path = tmp_path / "a.npy"
    path.write_bytes((tmp_path / "a.npz").read_bytes())
    assert "rename it to .npz" in refused(path)
    np.savez(tmp_path / "b.npz", xyz=np.array([["a"] * 6] * 3), rgb=np.zeros((3, 3)))
    assert "expected numbers" in refused(tmp_path / "b.npz")
    np.save(path, files.XYZ)
    whole = path.read_bytes()
    # What NumPy's parser of headers raises: SyntaxError, TokenError, and others.
    for old, new in [(b"'<f4'", b"',,,'"), (b"(200", b"((00"), (b"}", b"("), (b"{", b"\xff")]:
        path.write_bytes(whole.replace(old, new, 1))
        assert "truncated or no NumPy file" in refused(path)


def test_numpy_pickles_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array({"xyz": 1}, dtype=object), allow_pickle=True)
    assert "could run code" in refused(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", other=files.XYZ)
    assert len(read(tmp_path / "b.npz")) == 200  # the only array
    np.savez(tmp_path / "b.npz", other=files.XYZ, more=files.XYZ)
    assert "holds other, more; expected x, y and z, or one of" in refused(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", np.zeros((4, 5, 3)))
    assert "(4, 5, 3)" in refused(tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.zeros((0, 3)))
    assert "no points" in refused(tmp_path / "d.npy")


def test_colours():
    assert make_cloud([[0, 0, 0]], [[255, 0, 51]]).rgb.tolist() == [[1.0, 0.0, np.float32(0.2)]]
    assert make_cloud([[0, 0, 0]], [[1, 0, 1]]).rgb[0, 0] == np.float32(1 / 255)
    assert make_cloud([[0, 0, 0]], [[1.0, 0, 0.5]]).rgb[0].tolist() == [1.0, 0.0, 0.5]
    assert make_cloud([[0, 0, 0]], [[65535, 0, 300]]).rgb[0, 0] == 1.0
    assert make_cloud([[0, 0, 0]], [[1 + 1e-7, 0, 0.5]]).rgb[0].tolist() == [1.0, 0.0, 0.5]
    for bad in ([[-1, 0, 0]], [[1e6, 0, 0]], [[np.nan, 0, 0]], [[1, 2]]):
        with pytest.raises(InputError, match="colours"):
            make_cloud([[0, 0, 0]], bad)


def test_dropped_points_may_have_any_colour(tmp_path):
    table = np.random.default_rng(0).uniform(size=(5, 6))
    table[2] = np.nan
    np.save(tmp_path / "a.npy", table)
    cloud = read(tmp_path / "a.npy", invalid="drop")
    np.testing.assert_allclose(cloud.rgb, table[[0, 1, 3, 4], 3:], atol=1e-6)
    table[2, :3] = 0
    np.save(tmp_path / "a.npy", table)
    with pytest.raises(InputError, match="colours of 1 of 5 points are empty or NaN"):
        read(tmp_path / "a.npy", invalid="drop")


PCD = """VERSION 0.7
FIELDS x y z {name}
SIZE 4 4 4 {size}
TYPE F F F {kind}
COUNT 1 1 1 1
WIDTH {n}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {n}
DATA {data}
"""


@pytest.mark.parametrize("name", ["rgb", "rgba"])
@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<f4", "<u8", "<f8"])
def test_packed_colours_of_pcd(name, dtype, tmp_path):
    path = tmp_path / "a.pcd"
    packed = np.array([0xFF0000, 0x00FF00, 0x3366CC], dtype="<u4")
    packed = packed.view("<f4").astype(dtype) if "f" in dtype else packed.astype(dtype)
    rows = np.zeros(3, dtype=[("xyz", "<f4", 3), ("c", dtype)])
    rows["c"] = packed
    kind, size = dtype[1].upper(), int(dtype[2])
    want = np.array([[255, 0, 0], [0, 255, 0], [0x33, 0x66, 0xCC]], dtype=np.float32) / 255
    head = PCD.format(name=name, size=size, kind=kind, n=3, data="binary")
    path.write_bytes(head.encode() + rows.tobytes())
    np.testing.assert_allclose(read(path).rgb, want, atol=1e-6)
    head = PCD.format(name=name, size=size, kind=kind, n=3, data="ascii")
    path.write_text(head + "".join(f"0 0 {i} {packed[i]!s}\n" for i in range(3)))
    np.testing.assert_allclose(read(path).rgb, want, atol=1e-6)
    head = PCD.format(name=name, size=size, kind=kind, n=1, data="ascii")
    path.write_text(f"{head}0 0 0 {packed[0]!s}\n")
    np.testing.assert_allclose(read(path).rgb, want[:1], atol=1e-6)


def test_pcd_keeps_opaque_colours(tmp_path):
    path = tmp_path / "a.pcd"  # the bits of opaque colours are those of a NaN in float32
    rows = np.array([(0, 0, 0, 0xFFC01020)], dtype="<f4,<f4,<f4,<u4").tobytes()
    for kind in "FUI":
        head = PCD.format(name="rgba", size=4, kind=kind, n=1, data="binary")
        path.write_bytes(head.encode() + rows)
        assert (read(path).rgb * 255).round().tolist() == [[0xC0, 0x10, 0x20]]


def test_crop():
    cloud = make_cloud(files.XYZ, files.RGB)
    part = crop(cloud, [0, 0, 0, np.inf, np.inf, np.inf])
    keep = (files.XYZ >= 0).all(axis=1)
    assert np.array_equal(part.xyz, files.XYZ[keep]) and len(part.rgb) == keep.sum()
    for box, message in [
        ([0, 0, 0], "six numbers"),
        ([1, 0, 0, 0, 1, 1], "x0 ≤ x1"),
        ([np.nan] * 6, "x0 ≤ x1"),
        ([90, 90, 90, 91, 91, 91], "no point in the box"),
    ]:
        with pytest.raises(InputError, match=message):
            crop(cloud, box)


def test_seeds_below_zero():
    with pytest.raises(InputError, match="seed=-1 is below 0"):
        read("a.glb", seed=-1)


def test_folders(tmp_path):
    with pytest.raises(InputError, match="no file of a known format"):
        find_files(tmp_path)
    (tmp_path / "b").mkdir()
    for name in ("b/z.npy", "a.xyz"):
        files.write(tmp_path / name)
    (tmp_path / "readme.md").write_text("no cloud")
    (tmp_path / ".trash").mkdir()
    for name in ("._a.xyz", "b/._z.npy", ".trash/c.npy"):
        (tmp_path / name).write_bytes(b"hidden")
    assert [p.name for p in find_files(tmp_path)] == ["a.xyz", "z.npy"]
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        find_files([tmp_path / "nope.npy"])
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "nope.npy")
    with pytest.raises(InputError, match=r"known: \.ply"):
        read(tmp_path / "readme.md")


@pytest.mark.parametrize(
    ("name", "library"), [("a.ply", "trimesh"), ("a.las", "laspy"), ("a.pcd", "pypcd4")]
)
def test_missing_libraries(name, library, tmp_path, monkeypatch):
    path = files.write(tmp_path / name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingPackageError, match=rf"needs {library}: pip install"):
        read(path)


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("a.e57", "pye57", "e57"), ("a.3mf", "lxml", "points"), ("a.3mf", "networkx", "points")],
)
def test_missing_libraries_of_rare_formats(name, library, extra, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingPackageError, match=rf"needs {library}: .*budwood\[{extra}\]"):
        read(tmp_path / name)


def test_sampling_a_surface_is_even():
    # Two triangles of areas 1 and 3, in different planes.
    vertices = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 5], [3, 0, 5], [0, 2, 5.0]])
    faces = np.array([[0, 1, 2], [3, 4, 5]])
    colors = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    points, draw = sample_surface(vertices, faces, 20_000, 0)
    rgb = vertex_paint(colors, faces)(*draw)
    upper = points[:, 2] > 2.5
    assert abs(upper.mean() - 0.75) < 0.02
    np.testing.assert_allclose(points[~upper].mean(axis=0), vertices[:3].mean(axis=0), atol=0.02)
    np.testing.assert_allclose(points[~upper], rgb[~upper] @ vertices[:3], atol=1e-9)
    flat, _ = sample_surface(np.zeros((3, 3)), np.array([[0, 1, 2]]), 5)
    assert np.array_equal(flat, np.zeros((5, 3)))


def test_colours_of_meshes_and_of_ply_points(tmp_path):
    import trimesh

    red = np.tile(np.array([[255, 0, 0, 255]], dtype=np.uint8), (200, 1))
    trimesh.PointCloud(files.XYZ, colors=red).export(tmp_path / "points.ply")
    cloud = read(tmp_path / "points.ply")
    np.testing.assert_allclose(cloud.xyz, files.XYZ, atol=1e-6)
    assert np.array_equal(cloud.rgb, np.tile([[1.0, 0, 0]], (200, 1)))
    ball = trimesh.creation.icosphere(subdivisions=1)
    ball.visual.vertex_colors = np.tile([[0, 255, 0, 255]], (len(ball.vertices), 1))
    for name in ("ball.ply", "ball.glb"):
        ball.export(tmp_path / name)
        cloud = read(tmp_path / name, n_points=50)
        np.testing.assert_allclose(cloud.rgb, np.tile([[0, 1.0, 0]], (50, 1)), atol=0.01)


def write_ply(path, kind, rgb, encoding="ascii", faces=""):
    """Four points with colours of a type, and perhaps faces."""
    names = [("float", "xyz"), (kind, ("red", "green", "blue"))]
    lines = ["ply", f"format {encoding} 1.0", "element vertex 4"]
    lines += [f"property {of} {name}" for of, group in names for name in group]
    if faces:
        lines += ["element face 2", "property list uchar int vertex_indices"]
    head = "\n".join([*lines, "end_header\n"])
    xyz = np.eye(4, 3)
    if encoding == "ascii":
        rows = [" ".join(map(str, (*a.tolist(), *b))) for a, b in zip(xyz, rgb, strict=True)]
        path.write_text(head + "\n".join(rows) + "\n" + faces)
        return
    code = {"ushort": "<u2", "int": "<i4"}[kind]
    table = np.zeros(4, dtype=[("xyz", "<f4", 3), ("rgb", code, 3)])
    table["xyz"], table["rgb"] = xyz, rgb
    path.write_bytes(head.encode() + table.tobytes())


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
def test_wide_colours_of_ply(encoding, tmp_path):
    path = tmp_path / "a.ply"
    rgb = [[32768, 65535, 0], [300, 1, 2], [65535, 0, 0], [256, 257, 258]]
    for kind in ("ushort", "int"):
        write_ply(path, kind, rgb, encoding)
        np.testing.assert_allclose(read(path).rgb, np.array(rgb) / 65535, atol=1e-6)
        write_ply(path, kind, [[255, 0, 51]] * 4, encoding)
        np.testing.assert_allclose(read(path).rgb, [[1, 0, 0.2]] * 4, atol=1e-6)
    write_ply(path, "int", [[-1, 0, 70000]] * 4, encoding)
    assert "colours must be" in refused(path)


def test_wide_colours_of_ply_meshes(tmp_path):
    path = tmp_path / "a.ply"
    write_ply(path, "uint16", [[32768, 65535, 0]] * 4, faces="3 0 1 2\n3 1 2 3\n")
    rgb = read(path, n_points=9).rgb
    np.testing.assert_allclose(rgb, [[32768 / 65535, 1, 0]] * 9, atol=1e-6)
    faces = "element face 2\nproperty ushort red\n"
    path.write_text(path.read_text().replace("element face 2\n", faces))
    assert "colours of faces as ushort; write them as uchar" in refused(path)


def test_ply_without_coordinates(tmp_path):
    path = tmp_path / "a.ply"
    write_ply(path, "uchar", [[1, 2, 3]] * 4)
    path.write_text(path.read_text().replace("float x", "float u"))
    assert "no x, y and z; the properties of its points are u, y, z, red, green" in refused(path)


def test_the_colour_of_a_material_without_texture(tmp_path):
    import trimesh

    box = trimesh.creation.box()
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[255, 0, 51, 255])
    for uv in (None, np.zeros((len(box.vertices), 2))):
        box.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
        box.export(tmp_path / "box.glb")
        rgb = read(tmp_path / "box.glb", n_points=30).rgb
        np.testing.assert_allclose(rgb, np.tile([[1, 0, 0.2]], (30, 1)), atol=1e-6)
    material = trimesh.visual.material.PBRMaterial(metallicFactor=0.5)
    box.visual = trimesh.visual.TextureVisuals(material=material)
    box.export(tmp_path / "plain.glb")
    assert read(tmp_path / "plain.glb", n_points=30).rgb is None


@pytest.mark.parametrize("keyword", ["OFF", "COFF"])
def test_off_with_counts_beside_the_keyword(keyword, tmp_path):
    lines = files.write(tmp_path / "a.off").read_text().splitlines(keepends=True)
    path = tmp_path / "b.off"
    for gap in ("", " "):
        path.write_text(f"# ModelNet40\n{keyword}{gap}" + "".join(lines[1:]))
        assert len(read(path, n_points=50)) == 50
        path.write_text(f"{keyword}{gap}" + "".join(lines[1:-3]))
        assert "truncated" in refused(path)
    path.write_text("".join(lines[1:]))
    assert "does not begin with OFF" in refused(path)


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
def test_ply_meshes_cut_anywhere(encoding, tmp_path):
    import trimesh

    whole = trimesh.creation.box().export(file_type="ply", encoding=encoding)
    path = tmp_path / "a.ply"
    path.write_bytes(whole)
    assert len(read(path, n_points=5)) == 5
    for n in range(1, len(whole) - 1):  # the last byte of the ASCII file is a line's end
        path.write_bytes(whole[:n])
        refused(path)
    path.write_bytes(whole.replace(b"element face 12", b"element face 1_2"))
    refused(path)


# What is written into a LAZ file, and where: a place, or one relative to the table of chunks.
# laspy and lazrs looped over such counts, or allocated them until the process was ended.
DAMAGED_LAZ = {
    "records": ("<I", 100, 2**31),
    "points": ("<I", 107, 2 * 10**9),
    "chunk": ("<B", "laszip", 0xFF),
    "chunks": ("<I", "table", 2**31),
}


@pytest.mark.parametrize("what", DAMAGED_LAZ)
def test_laz_that_declares_more_than_it_can_hold(what, tmp_path):
    path = files.write(tmp_path / "a.laz")
    content = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 96)[0]
    places = {"table": struct.unpack_from("<q", content, start)[0] + 4}
    places["laszip"] = 227 + 54 + 12 + 3  # the last byte of the size of chunks
    code, place, value = DAMAGED_LAZ[what]
    struct.pack_into(code, content, places.get(place, place), value)
    path.write_bytes(content)
    assert "damaged" in refused(path)


@pytest.mark.parametrize("labels", [3, None, {"chair": 1}, [1, 2], "chair"])
def test_embeddings_with_labels_that_are_no_list(labels, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"embeddings": torch.ones(2, 4)}, path, {"labels": json.dumps(labels)})
    with pytest.raises(InputError, match=r"a\.safetensors has labels .* expected a list of"):
        read_embeddings(path)


def test_scenes_of_several_meshes_keep_their_places(tmp_path):
    import trimesh

    scene = trimesh.Scene()
    for x in (0.0, 10.0):
        place = trimesh.transformations.translation_matrix([x, 0, 0])
        scene.add_geometry(trimesh.creation.icosphere(subdivisions=1), transform=place)
    scene.export(tmp_path / "two.glb")
    xyz = read(tmp_path / "two.glb", n_points=400).xyz
    right = xyz[:, 0] > 5
    assert 0.4 < right.mean() < 0.6
    np.testing.assert_allclose(xyz[right].mean(axis=0), [10, 0, 0], atol=0.2)


def test_ten_million_points(tmp_path):
    path = tmp_path / "many.npy"
    np.save(path, np.ones((10_000_000, 3), dtype=np.float16))
    assert len(read(path)) == 10_000_000


def test_fields_of_different_lengths(tmp_path):
    some, fewer = np.ones(5), np.ones(4)
    np.savez(tmp_path / "xyz.npz", x=some, y=fewer, z=some)
    np.savez(tmp_path / "rgb.npz", x=some, y=some, z=some, r=some, g=some, b=fewer)
    for name, fields in (("xyz", "x, y, z"), ("rgb", "r, g, b")):
        with pytest.raises(InputError, match=f"{name}.npz.*fields {fields} have"):
            read(tmp_path / f"{name}.npz")


def test_numbers_in_names_count_as_numbers(tmp_path):
    names = ["10.npy", "2.npy", "000003.npy", "a2.npy", "a10.npy"]
    for name in names:
        np.save(tmp_path / name, np.ones((3, 3)))
    found = [path.name for path in find_files([tmp_path])]
    assert found == ["2.npy", "000003.npy", "10.npy", "a2.npy", "a10.npy"]
