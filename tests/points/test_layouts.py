"""What sensors and tools write: read as it is meant, or refused with the true reason."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from PIL import Image

from budwood.errors import InputError
from budwood.points.io import FORMATS, cloud_of, find_files, make_cloud, read, unknown_files
from budwood.points.io.fields import letter_of
from tests.points import files, layouts
from tests.points.files import refused

trimesh = pytest.importorskip("trimesh")
laspy = pytest.importorskip("laspy")
pytest.importorskip("pypcd4")

XYZ, RGB = files.XYZ, files.RGB


# --- bare tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_points", [60, 211, 840, 6000])
@pytest.mark.parametrize("scene", ["car", "frame"])
@pytest.mark.parametrize("layout", layouts.BINS)
def test_columns_of_bin_files(layout, scene, n_points, tmp_path):
    make, letters = layouts.BINS[layout]
    xyz = layouts.car(n_points) if scene == "car" else layouts.frame(n_points)
    table = make(xyz)
    table.tofile(tmp_path / "a.bin")
    cloud = read(tmp_path / "a.bin")
    assert cloud.assumed.columns == letters
    np.testing.assert_array_equal(cloud.xyz, table[:, :3])
    assert (cloud.rgb is None) == ("r" not in letters)


def test_nuscenes_by_its_suffix(tmp_path):
    # Eight points: too few to tell by their values.
    for n_points in (8, 500):
        layouts.nuscenes(layouts.frame(n_points)).tofile(tmp_path / "a.pcd.bin")
        assert read(tmp_path / "a.pcd.bin").assumed.columns == "xyz__"


def test_bin_files_that_could_be_anything(tmp_path):
    path = tmp_path / "a.bin"
    np.random.default_rng(0).uniform(size=(60, 4)).astype("<f4").tofile(path)  # a unit cube
    message = refused(path)
    assert "could have" in message and "columns='xyz_'" in message
    assert len(read(path, columns="xyz_")) == 60
    layouts.kitti(layouts.frame(1000)).tofile(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert "not whole rows of the 4 columns" in refused(path)
    path.write_bytes(whole[:-1])
    assert "not a multiple of 4" in refused(path)
    layouts.frame(1000).astype("<f8").tofile(path)
    assert "holds no float32 coordinates" in refused(path)
    path.write_bytes(np.random.default_rng(0).bytes(4000))
    refused(path)


# --- tables and arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "letter"),
    [
        *((name, "x") for name in ("x", "X", "//X", "X (m)", "Points:0", "Points_m_XYZ:0")),
        *((name, "y") for name in ("cartesianY", "pos_y", "y_coord", '"Y"')),
        *((name, "r") for name in ("R", "red", "Red", "diffuse_red", "colorRed")),
        *((name, None) for name in ("nx", "vx", "range", "ring", "rgb", "time", "normal_x")),
    ],
)
def test_spellings_of_fields(name, letter):
    assert letter_of(name) == letter


@pytest.mark.parametrize(
    "dtype",
    [
        [("x", "f4"), ("y", "f4"), ("z", "f4"), ("intensity", "f4"), ("ring", "u2")],
        [("intensity", "u1"), ("X", "f8"), ("Y", "f8"), ("Z", "f8")],
        [("xyz", "f4", 3), ("rgb", "u1", 3)],
        [("x", "f4"), ("y", "f4"), ("z", "f4"), ("rgb", "f4")],
        [("x", "f4"), ("y", "f4"), ("z", "f4"), ("r", "u1"), ("g", "u1"), ("b", "u1")],
    ],
)
def test_structured_arrays(dtype, tmp_path):
    table = np.zeros(len(XYZ), dtype=dtype)
    names = table.dtype.names
    for at, letter in enumerate("xyz"):
        if "xyz" in names:
            table["xyz"][:, at] = XYZ[:, at]
        else:
            table[letter if letter in names else letter.upper()] = XYZ[:, at]
    packed = (RGB.astype(np.uint32) << np.array([16, 8, 0])).sum(axis=1).astype(np.uint32)
    if "r" in names:
        for at, letter in enumerate("rgb"):
            table[letter] = RGB[:, at]
    elif "rgb" in names:
        table["rgb"] = RGB if table["rgb"].ndim == 2 else packed.view(np.float32)
    np.save(tmp_path / "a.npy", table)
    np.savez(tmp_path / "a.npz", scan=table)
    for cloud in (read(tmp_path / "a.npy"), read(tmp_path / "a.npz"), cloud_of(table, "array")):
        np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-6)
        if {"r", "rgb"} & set(names):
            np.testing.assert_allclose(cloud.rgb, RGB / 255, atol=1e-6)
        else:
            assert cloud.rgb is None
    table = np.zeros(3, dtype=[("range", "f4"), ("azimuth", "f4")])
    with pytest.raises(InputError, match="holds range, azimuth; expected x, y and z"):
        cloud_of(table, "array")


def test_archives(tmp_path):
    path = tmp_path / "a.npz"
    x, y, z = XYZ.T
    np.savez(path, x=x, y=y, z=z, red=RGB[:, 0], green=RGB[:, 1], blue=RGB[:, 2])
    np.testing.assert_allclose(read(path).xyz, XYZ)
    np.testing.assert_allclose(read(path).rgb, RGB / 255, atol=1e-6)
    for names in ({"POINTS": XYZ}, {"anything": XYZ}, {"pcloud_points": XYZ, "other": x}):
        np.savez(path, **names)
        np.testing.assert_allclose(read(path).xyz, XYZ)
    np.savez(path, xyz=XYZ, color=np.array(["#ff0000"] * len(XYZ)))
    assert "colours are not numbers" in refused(path)
    np.savez(path, lon=x, lat=y, alt=z)
    assert "degrees are not lengths" in refused(path)


@pytest.mark.parametrize("order", ["xyz_rgb", "xyzrgb_", "xyzrgb___", "xyz___rgb", "xyz__"])
def test_wide_tables(order, tmp_path):
    rng = np.random.default_rng(0)
    rest = iter(rng.normal(size=(9, len(XYZ))))
    column = dict(zip("xyzrgb", [*XYZ.T, *RGB.T], strict=True))
    table = np.stack([column[one] if one != "_" else next(rest) for one in order], axis=1)
    for name, write in (("a.xyz", np.savetxt), ("a.npy", np.save)):
        write(tmp_path / name, table)
        cloud = read(tmp_path / name)
        np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-6)
        assert cloud.assumed.columns == order
        if "r" in order:
            np.testing.assert_allclose(cloud.rgb, RGB / 255, atol=1e-6)


def test_colours_that_could_be_in_two_places(tmp_path):
    intensity = np.random.default_rng(3).integers(0, 256, (len(XYZ), 1))
    np.savetxt(tmp_path / "a.txt", np.hstack([XYZ, intensity, RGB]))
    cloud = read(tmp_path / "a.txt")
    assert cloud.rgb is None
    (note,) = cloud.assumed.notes
    assert "columns 4 to 6 or 5 to 7, so none are used" in note
    assert read(tmp_path / "a.txt", columns="xyz_rgb").rgb is not None


def test_tables_that_are_no_points(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, XYZ.T)
    assert "save its transpose" in refused(path)
    np.save(path, np.hstack([np.arange(len(XYZ))[:, None], XYZ]))
    assert "counts the rows" in refused(path)
    assert len(read(path, columns="_xyz")) == len(XYZ)


def test_text_with_names_and_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "label,X (m),Y (m),Z (m),Red,Green,Blue\ncar,1,2,3,255,0,0\nbus,4,5,6,0,0,255\n"
    )
    cloud = read(path)
    assert cloud.xyz.tolist() == [[1, 2, 3], [4, 5, 6]] and cloud.rgb.tolist()[0] == [1, 0, 0]
    assert cloud.assumed.columns is None  # nothing was assumed
    path.write_text("car 1 2 3\nbus 4 5 6\n")
    assert read(path, columns="_xyz").xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert "names 3" in refused(path, columns="xyz")
    path.write_text("# r g b x y z\n10 20 30 1 2 3\n40 50 60 4 5 6\n")
    assert read(path).xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
    path.write_text("lon,lat,alt\n8.4,49.0,110\n8.5,49.1,112\n")
    assert "degrees are not lengths" in refused(path)


def test_leica_and_shapenet(tmp_path):
    path = tmp_path / "a.pts"
    rows = np.hstack([XYZ, RGB[:, :1], RGB])
    half = len(rows) // 2
    with path.open("w") as file:
        for part in (rows[:half], rows[half:]):
            file.write(f"{len(part)}\n")
            np.savetxt(file, part, fmt=["%.5f"] * 3 + ["%d"] * 4)
    cloud = read(path)
    np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-5)
    np.testing.assert_allclose(cloud.rgb, RGB / 255, atol=1e-6)
    assert cloud.assumed.up == "z"
    path.write_text(path.read_text().rsplit("\n", 3)[0])
    assert "truncated" in refused(path)
    np.savetxt(path, XYZ)
    assert read(path).assumed.up == "y"


# --- beams without a return -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npy", "bin", "pcd", "txt", "ply"])
@pytest.mark.parametrize("empty", [0.0, np.nan, np.inf])
def test_beams_without_a_return(empty, suffix, tmp_path):
    from pypcd4 import PointCloud

    xyz = layouts.car(100)
    rows = np.vstack(
        [np.full((30, 3), empty, np.float32), xyz, np.full((20, 3), empty, np.float32)]
    )
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, rows)
    elif suffix == "bin":
        layouts.kitti(rows).tofile(path)
    elif suffix == "pcd":
        PointCloud.from_xyz_points(rows).save(path)
    elif suffix == "txt":
        np.savetxt(path, rows)
    else:
        table = rows.astype("<f4").tobytes()
        names = "".join(f"property float {letter}\n" for letter in "xyz")
        head = f"ply\nformat binary_little_endian 1.0\nelement vertex 150\n{names}end_header\n"
        path.write_bytes(head.encode() + table)
    cloud = read(path)
    np.testing.assert_allclose(cloud.xyz, xyz, atol=1e-4)
    assert cloud.assumed.dropped == {"no return": 50}


def test_what_is_not_a_beam_without_a_return():
    assert len(make_cloud([[0, 0, 0], [1, 1, 1]])) == 2  # one point may lie there
    assert len(make_cloud(np.zeros((3, 3)))) == 3  # there is nothing else
    with pytest.raises(InputError, match="all 3 points have NaN or infinite coordinates"):
        make_cloud(np.full((3, 3), np.inf))
    with pytest.raises(InputError, match="1 of 3 points"):
        make_cloud([[0, 1, np.nan], [1, 1, 1], [np.nan] * 3])
    cloud = make_cloud([[0, 1, np.nan], [1, 1, 1], [np.nan] * 3], invalid="drop")
    assert cloud.assumed.dropped == {"no return": 1, "invalid": 1}


def test_meshes_keep_vertices_at_the_origin(tmp_path):
    corner = trimesh.Trimesh(
        [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]],
        [[0, 1, 2], [3, 4, 5]],
        process=False,
    )
    corner.export(tmp_path / "a.ply")
    cloud = read(tmp_path / "a.ply", n_points=200)
    assert len(cloud) == 200 and not cloud.assumed.dropped
    assert 0.3 < (cloud.xyz[:, 2] > 0).mean() < 0.7


# --- axes and units -------------------------------------------------------------------------------


def test_axes_by_format(tmp_path):
    for name in files.FORMATS:
        path = files.write(tmp_path / f"a.{name}")
        wanted = "z" if name == "pts" else FORMATS[f".{name}"].up  # Leica's
        assert read(path).assumed.up == wanted
    scans = {suffix for suffix, entry in FORMATS.items() if entry.up == "z"}
    assert scans == {".pcd", ".las", ".laz", ".e57", ".bin", ".3mf"}


def test_degrees(tmp_path):
    rng = np.random.default_rng(0)
    metres = rng.uniform(0, 1, size=(200, 3)) * (4.2, 1.8, 1.5)
    degrees = metres * (1.4e-5, 9e-6, 1) + np.array([8.4, 49.0, 110])
    assert "degrees" in make_cloud(degrees).assumed.notes[0]
    np.savetxt(tmp_path / "a.xyz", degrees)
    assert "project them to metres" in read(tmp_path / "a.xyz").assumed.notes[0]
    for fine in (
        metres,
        metres + np.array([458_000, 5_428_000, 110]),
        metres * (1e-2, 1e-2, 1) + 5,
    ):
        assert make_cloud(fine).assumed.notes == ()


@pytest.mark.parametrize("by", ["keys", "wkt"])
def test_las_in_degrees(by, tmp_path):
    from laspy.vlrs.known import GeoKeyDirectoryVlr, GeoKeyEntryStruct, WktCoordinateSystemVlr

    header = laspy.LasHeader(point_format=3)
    header.scales = [1e-7, 1e-7, 1e-3]
    if by == "keys":
        record = GeoKeyDirectoryVlr()
        record.geo_keys = [
            GeoKeyEntryStruct(id=key, tiff_tag_location=0, count=1, value_offset=v)
            for key, v in ((1024, 2), (2048, 4326))
        ]
        record.geo_keys_header.number_of_keys = 2
    else:
        record = WktCoordinateSystemVlr('GEOGCS["WGS 84",DATUM["WGS_1984"]]')
    header.vlrs.append(record)
    data = laspy.LasData(header)
    data.x, data.y, data.z = np.random.default_rng(0).uniform(size=(3, 50)) + np.array(
        [[8], [49], [100]]
    )
    data.write(tmp_path / "a.las")
    cloud = read(tmp_path / "a.las")
    assert cloud.assumed.units == "degrees"
    assert "coordinate system is of degrees" in cloud.assumed.notes[0]


FEET = 'UNIT["US survey foot",0.304800609601219]'
DEGREES = 'GEOGCS["NAD83",DATUM["D",SPHEROID["GRS 1980",6378137,298.25]],UNIT["degree",0.01745329]]'
UTM = 'BASEGEOGCRS["WGS 84",DATUM["W",ELLIPSOID["WGS 84",6378137,298.25,LENGTHUNIT["metre",1]]]]'


@pytest.mark.parametrize(
    ("wkt", "units", "noted"),
    [
        (f'PROJCS["NY",{DEGREES},PROJECTION["LCC"],{FEET},AXIS["X",EAST]]', "us-ft", False),
        (
            f'COMPD_CS["NY",PROJCS["NY",{DEGREES},PROJECTION["LCC"],{FEET}],VERT_CS["N",{FEET}]]',
            "us-ft",
            False,
        ),
        (
            f'COMPD_CS["NY",PROJCS["NY",{DEGREES},{FEET}],VERT_CS["N",UNIT["metre",1]]]',
            "us-ft",
            True,
        ),
        (f'PROJCS["U",{DEGREES},PROJECTION["TM"],UNIT["metre",1]]', "m", False),
        (
            f'PROJCRS["A",{UTM},CS[Cartesian,2],AXIS["E",east],LENGTHUNIT["foot",0.3048]]',
            "ft",
            False,
        ),
        ("", "m", False),
        ('LOCAL_CS["site",UNIT["hands",0.1016]]', "m", False),
    ],
)
def test_units_of_las_by_wkt(wkt, units, noted, tmp_path):
    from laspy.vlrs.known import WktCoordinateSystemVlr

    _las_with(WktCoordinateSystemVlr(wkt), tmp_path / "a.las")
    about = read(tmp_path / "a.las").assumed
    assert about.units == units
    assert [("shape is stretched" in note) for note in about.notes] == [True] * noted


@pytest.mark.parametrize(
    ("code", "units"), [(9001, "m"), (9002, "ft"), (9003, "us-ft"), (9999, "m")]
)
def test_units_of_las_by_geotiff_keys(code, units, tmp_path):
    from laspy.vlrs.known import GeoKeyDirectoryVlr, GeoKeyEntryStruct

    record = GeoKeyDirectoryVlr()
    record.geo_keys = [
        GeoKeyEntryStruct(id=key, tiff_tag_location=0, count=1, value_offset=value)
        for key, value in ((1024, 1), (3076, code))
    ]
    record.geo_keys_header.number_of_keys = 2
    _las_with(record, tmp_path / "a.las")
    assert read(tmp_path / "a.las").assumed.units == units


def _las_with(record, path):
    header = laspy.LasHeader(point_format=3)
    header.vlrs.append(record)
    data = laspy.LasData(header)
    data.x, data.y, data.z = np.random.default_rng(0).uniform(size=(3, 50))
    data.write(path)


# --- PCD ------------------------------------------------------------------------------------------

PCD = {
    "0.7": "VERSION 0.7\nFIELDS {f}\nSIZE {s}\nTYPE {t}\nCOUNT {c}\nWIDTH {n}\nHEIGHT 1\n"
    "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {n}\nDATA {d}\n",
    "0.6": "# .PCD v.6\nVERSION .6\nFIELDS {f}\nSIZE {s}\nTYPE {t}\nCOUNT {c}\nWIDTH {n}\n"
    "HEIGHT 1\nPOINTS {n}\nDATA {d}\n",
    "0.5": "# .PCD v.5 - Point Cloud Data file format\nVERSION .5\nFIELDS {f}\nSIZE {s}\nTYPE {t}\n"
    "WIDTH {n}\nHEIGHT 1\nDATA {d}\n",
    "columns": "COLUMNS {f}\nSIZE {s}\nTYPE {t}\nWIDTH {n}\nHEIGHT 1\nPOINTS {n}\nDATA {d}\n",
}


def pcd(version, data, fields, sizes, types, table, counts=None):
    """A file: ``table`` is structured."""
    words = {"f": fields, "s": sizes, "t": types, "c": counts or [1] * len(fields)}
    words = {key: " ".join(map(str, value)) for key, value in words.items()}
    head = PCD[version].format(**words, n=len(table), d=data).encode()
    if data == "binary":
        return head + table.tobytes()
    rows = "\n".join("  ".join(str(value) for value in row) + " " for row in table.tolist())
    return head + rows.encode() + b"\n"


@pytest.mark.parametrize("data", ["ascii", "binary"])
@pytest.mark.parametrize("version", PCD)
def test_versions_of_pcd(version, data, tmp_path):
    table = np.zeros(len(XYZ), dtype=[("xyz", "<f4", 3)])
    table["xyz"] = XYZ
    if data == "ascii":
        table = table["xyz"]
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd(version, data, "xyz", [4] * 3, "FFF", table))
    np.testing.assert_allclose(read(path).xyz, XYZ, atol=1e-6)


@pytest.mark.parametrize(
    "names", [["X", "Y", "Z", "R", "G", "B"], ["x", "y", "z", "red", "green", "blue"]]
)
def test_fields_of_pcd(names, tmp_path):
    table = np.zeros(len(XYZ), dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3), ("_", "u1", 5)])
    table["xyz"], table["rgb"] = XYZ, RGB
    path = tmp_path / "a.pcd"
    fields, counts = [*names, "empty", "_"], [1] * 6 + [0, 5]
    sizes, types = [4] * 3 + [1] * 3 + [4, 1], [*"FFFUUUFU"]
    path.write_bytes(pcd("0.7", "binary", fields, sizes, types, table, counts))
    cloud = read(path)
    np.testing.assert_allclose(cloud.xyz, XYZ)
    np.testing.assert_allclose(cloud.rgb, RGB / 255, atol=1e-6)


def test_pcd_with_the_true_reason(tmp_path):
    path = tmp_path / "a.pcd"
    table = np.zeros(4, dtype="<f4")
    for change, reason in [
        (("VERSION 0.7", "VERSION 0.8"), "is PCD of version 0.8; 0.5, 0.6 and 0.7"),
        (("SIZE 4", "SIZE 3"), "field range has TYPE F and SIZE 3, no PCD type"),
        (("SIZE 4\n", "\n"), "its header lacks SIZE"),
        (("SIZE 4", "SIZE 4 4"), "differ in length"),
        (("DATA binary", "DATE binary"), "its header does not end with DATA"),
        (("range", "range"), "holds range; expected x, y and z"),
    ]:
        content = pcd("0.7", "binary", ["range"], [4], "F", table)
        path.write_bytes(content.replace(*(word.encode() for word in change)))
        assert reason in refused(path)


# --- PLY and meshes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uchar", "float", "float255", "ushort"])
@pytest.mark.parametrize("names", ["X Y Z diffuse_red diffuse_green diffuse_blue", "x y z r g b"])
def test_spellings_of_ply(names, kind, tmp_path):
    scale = {"uchar": 255, "float": 1, "float255": 255, "ushort": 65535}[kind]
    colors = RGB / 255 * scale
    colors = colors if "float" in kind else colors.round().astype(int)
    types = ["float"] * 3 + [kind.removesuffix("255")] * 3
    head = ["ply", "format ascii 1.0", "comment a scan", f"element vertex {len(XYZ)}"]
    head += [f"property {of} {name}" for of, name in zip(types, names.split(), strict=True)]
    rows = [
        " ".join(map(str, (*a.tolist(), *b))) for a, b in zip(XYZ, colors.tolist(), strict=True)
    ]
    path = tmp_path / "a.ply"
    path.write_text("\n".join([*head, "end_header", *rows]) + "\n")
    cloud = read(path)
    np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-6)
    np.testing.assert_allclose(cloud.rgb, RGB / 255, atol=1e-5)
    faces = ["element face 1", "property list uchar int vertex_indices", "end_header"]
    path.write_text("\n".join([*head, *faces, *rows, "3 0 1 2"]) + "\n")
    mesh = read(path, n_points=20)
    low, high = RGB[:3].min(axis=0) / 255, RGB[:3].max(axis=0) / 255
    assert ((mesh.rgb >= low - 1e-5) & (mesh.rgb <= high + 1e-5)).all()


def checkered(folder, name):
    """A square of two triangles with a texture: red at the left, blue at the right."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 2] = 255, 255
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    material = trimesh.visual.material.SimpleMaterial(image=Image.fromarray(pixels))
    if name in ("glb", "gltf"):
        material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(pixels))
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
    square.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    path = folder / f"square.{name}"
    files.save_mesh(square, path)
    return path


@pytest.mark.parametrize("name", ["glb", "gltf", "obj"])
def test_textures_are_sampled_at_each_point(name, tmp_path):
    path = checkered(tmp_path, name)
    cloud = read(path, n_points=500)
    left = cloud.xyz[:, 0] < 0.48
    right = cloud.xyz[:, 0] > 0.52
    np.testing.assert_allclose(cloud.rgb[left], [[1, 0, 0]] * left.sum(), atol=0.02)
    np.testing.assert_allclose(cloud.rgb[right], [[0, 0, 1]] * right.sum(), atol=0.02)
    assert not cloud.assumed.notes


def test_textures_that_are_not_there(tmp_path):
    path = checkered(tmp_path, "obj")
    (texture,) = tmp_path.glob("*.png")
    texture.unlink()
    (note,) = read(path, n_points=9).assumed.notes
    assert f"{texture.name} cannot be found" in note
    (material,) = tmp_path.glob("*.mtl")
    material.unlink()
    (note,) = read(path, n_points=9).assumed.notes
    assert f"{material.name} cannot be found" in note


def test_colours_of_faces(tmp_path):
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    square.visual.face_colors = [[255, 0, 0, 255], [0, 0, 255, 255]]
    square.export(tmp_path / "a.ply")
    cloud = read(tmp_path / "a.ply", n_points=300)
    below = cloud.xyz[:, 1] < cloud.xyz[:, 0]
    np.testing.assert_allclose(cloud.rgb[below], [[1, 0, 0]] * below.sum(), atol=1e-6)
    np.testing.assert_allclose(cloud.rgb[~below], [[0, 0, 1]] * (~below).sum(), atol=1e-6)


def test_parts_without_a_colour(tmp_path):
    scene = trimesh.Scene()
    red = trimesh.creation.box()
    red.visual.vertex_colors = [255, 0, 0, 255]
    scene.add_geometry(red)
    plain = trimesh.creation.box()
    plain.apply_translation([10, 0, 0])
    scene.add_geometry(plain)
    scene.export(tmp_path / "a.glb")
    cloud = read(tmp_path / "a.glb", n_points=100)
    here = cloud.xyz[:, 0] < 5
    np.testing.assert_allclose(cloud.rgb[here], [[1, 0, 0]] * here.sum(), atol=1e-6)
    assert len(np.unique(cloud.rgb[~here], axis=0)) == 1


def test_gltf_and_its_files(tmp_path):
    path = checkered(tmp_path, "gltf")
    buffers = sorted(file.name for file in tmp_path.glob("*.bin"))
    assert buffers
    assert find_files(tmp_path) == [path]  # its buffers are no KITTI frames
    (tmp_path / buffers[0]).rename(tmp_path / "gone")
    assert f"needs {buffers[0]}, which is not beside it" in refused(path)
    path.write_text(path.read_text()[:50])
    assert "truncated or no glTF file" in refused(path)


@pytest.mark.parametrize("name", ["glb", "gltf"])
def test_compressed_gltf(name, tmp_path):
    path = checkered(tmp_path, name)
    content = path.read_bytes()
    for extension in ("KHR_draco_mesh_compression", "EXT_meshopt_compression"):
        required = f'{{"extensionsRequired":["{extension}"],'.encode()
        if name == "gltf":
            path.write_bytes(content.replace(b"{", required, 1))
        else:
            size = struct.unpack_from("<I", content, 12)[0]
            chunk = content[20 : 20 + size].replace(b"{", required, 1)
            head = struct.pack("<4sIIII", b"glTF", 2, len(content), len(chunk), 0x4E4F534A)
            path.write_bytes(head + chunk + content[20 + size :])
        assert f"is compressed ({extension});" in refused(path)


def test_3mf(tmp_path):
    pytest.importorskip("lxml")
    pytest.importorskip("networkx")
    path = tmp_path / "ball.3mf"
    trimesh.creation.icosphere(subdivisions=2).export(path)
    cloud = read(path, n_points=100)
    assert cloud.assumed.up == "z" and cloud.assumed.units in ("mm", "m")
    assert np.linalg.norm(cloud.xyz, axis=1).min() > 0.9
    path.write_bytes(path.read_bytes()[:200])
    assert "truncated or no 3MF file" in refused(path)


def test_e57(tmp_path):
    pye57 = pytest.importorskip("pye57")
    path = tmp_path / "a.e57"
    file = pye57.E57(str(path), mode="w")
    for half in (slice(0, 100), slice(100, 200)):
        fields = {
            f"cartesian{name}": XYZ[half, at].astype(np.float64) for at, name in enumerate("XYZ")
        }
        fields |= {
            f"color{name}": RGB[half, at] for at, name in enumerate(("Red", "Green", "Blue"))
        }
        file.write_scan_raw(fields, rotation=np.array([1.0, 0, 0, 0]), translation=np.zeros(3))
    file.close()
    cloud = read(path)
    np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-6)
    np.testing.assert_allclose(cloud.rgb, RGB / 255, atol=1e-6)
    assert (cloud.assumed.up, cloud.assumed.units) == ("z", "m")
    path.write_bytes(path.read_bytes()[:500])
    assert "truncated or damaged" in refused(path)


def test_unknown_files_in_folders(tmp_path):
    for name in ("a.npy", "b.md", "c.jpg", "d.JPG", "e", ".hidden.md"):
        np.save(tmp_path / "x.npy", XYZ)
        (tmp_path / "x.npy").rename(tmp_path / name)
    assert unknown_files(tmp_path) == {".jpg": 2, ".md": 1, "": 1}
    (tmp_path / "a.npy").unlink()
    with pytest.raises(InputError, match=r"it has 2 \.jpg"):
        find_files(tmp_path)


def test_json_of_gltf_is_not_trusted(tmp_path):
    for content in ([], {"buffers": 3}, {"buffers": [None]}):
        (tmp_path / "a.gltf").write_text(json.dumps(content))
        refused(tmp_path / "a.gltf")


def test_columns_of_a_file_that_names_its_own_are_said_to_have_no_effect(tmp_path):
    xyz = np.random.default_rng(0).normal(size=(20, 3)).astype("<f4")
    trimesh.PointCloud(xyz).export(tmp_path / "cloud.ply")
    fields = np.rec.fromarrays(xyz.T, names="x,y,z")
    np.save(tmp_path / "fields.npy", fields)
    np.savez(tmp_path / "named.npz", x=xyz[:, 0], y=xyz[:, 1], z=xyz[:, 2])
    np.save(tmp_path / "plain.npy", xyz)
    for file in tmp_path.iterdir():
        notes = read(file, columns="zyx").assumed.notes
        wanted = () if file.stem == "plain" else "columns='zyx' has no effect on"
        assert notes == wanted or (wanted and wanted in notes[0]), file
        assert not read(file).assumed.notes


ROWS = np.random.default_rng(3).normal(size=(20, 3)).round(3)


def rows(form):
    return "\n".join(form.format(*row, i=i) for i, row in enumerate(ROWS))


@pytest.mark.parametrize(
    "text",
    [
        "X [m]\tY [m]\tZ [m]\tIntensity\n" + rows("{}\t{}\t{}\t5"),
        "Point ID\tX\tY\tZ\tIntensity\n" + rows("{i}\t{}\t{}\t{}\t5"),
        "# x y z label\n" + rows("{} {} {} car"),
        "//X Y Z Intensity\n20\n" + rows("{} {} {} 3"),
        "# c\n" * 300 + rows("{} {} {}"),
        rows("{},{},{},"),
        "x,y,z,\n" + rows("{},{},{},"),
        ",x,y,z,name\n" + rows("{i},{},{},{},an oak"),
        "0,1,2\n" + rows("{},{},{}"),  # pandas, of a table without names
        "note,x,y,z\n" + rows("#{i},{},{},{}"),
        "# c\nx,y,z\n# made by hand\n\n" + rows("{},{},{}"),
    ],
)
def test_tables_of_other_programs(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    np.testing.assert_allclose(read(tmp_path / "a.txt").xyz, ROWS, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (rows("{};{};{}").replace(".", ","), "has decimal commas; write decimal points"),
        ("x;y;z\n" + rows("{};{};{}").replace(".", ","), "has decimal commas"),
        ("x,y,z\n" + rows("{},{},{},4"), "its header names 3 columns, and its first row has 4"),
        (rows("{} {} {} car"), "has values that are no numbers, and no header above it"),
        ("//X Y Z\n21\n" + rows("{} {} {}"), "declares 21 points"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, reason):
    (tmp_path / "a.txt").write_text(text)
    assert reason in refused(tmp_path / "a.txt")


def test_points_behind_those_that_a_pcd_declares(tmp_path):
    head = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {n}\nHEIGHT 1\nPOINTS {n}\nDATA {kind}\n"
    path = tmp_path / "a.pcd"
    path.write_bytes(head.format(n=15, kind="binary").encode() + ROWS.astype("<f4").tobytes())
    cloud = read(path)
    assert len(cloud) == 15
    assert cloud.assumed.notes == ("5 points behind those of its header are left out",)
    path.write_text(head.format(n=15, kind="ascii") + rows("{} {} {}") + "\n")
    assert "is damaged: 20 points, and its header says 15" in refused(path)
    path.write_text(head.format(n=-5, kind="ascii") + rows("{} {} {}") + "\n")
    assert "is damaged: WIDTH -5; expected one number" in refused(path)


PCD_HEADER = {
    "VERSION": "0.7",
    "FIELDS": "x y z",
    "SIZE": "4 4 4",
    "TYPE": "F F F",
    "COUNT": "1 1 1",
    "WIDTH": "20",
    "HEIGHT": "1",
    "VIEWPOINT": "0 0 0 1 0 0 0",
    "POINTS": "20",
    "DATA": "ascii",
}


def save_pcd(folder, **changes):
    head = "".join(f"{key} {value}\n" for key, value in (PCD_HEADER | changes).items())
    (folder / "a.pcd").write_text(head + rows("{} {} {}") + "\n")
    return folder / "a.pcd"


@pytest.mark.parametrize("key", PCD_HEADER)
def test_lines_of_a_pcd_with_nothing_behind_the_keyword(key, tmp_path):
    path = save_pcd(tmp_path, **{key: ""})
    if key in ("FIELDS", "SIZE", "TYPE", "WIDTH", "DATA"):
        assert f"is damaged: its header lacks {key}" in refused(path)
    else:
        np.testing.assert_allclose(read(path).xyz, ROWS, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("POINTS", "1 1", "is damaged: POINTS 1 1; expected one number"),
        ("POINTS", "1", "is damaged: 20 points, and its header says 1"),
        ("WIDTH", "x", "is damaged: WIDTH x; expected one number"),
        ("HEIGHT", "-1", "is damaged: HEIGHT -1; expected one number"),
        ("COUNT", "1 1 x", "is damaged: COUNT 1 1 x; expected numbers"),
        ("COUNT", "0 0 0", "is damaged: COUNT 0 0 0; expected numbers"),
        ("DATA", "text", "has DATA text; ascii, binary, binary_compressed are understood"),
    ],
)
def test_headers_of_pcd_that_are_refused(key, value, reason, tmp_path):
    assert reason in refused(save_pcd(tmp_path, **{key: value}))


def test_width_and_height_of_a_pcd_that_are_not_its_points(tmp_path):
    for width, height in ((3, 2), (40, 1)):
        cloud = read(save_pcd(tmp_path, WIDTH=width, HEIGHT=height))
        np.testing.assert_allclose(cloud.xyz, ROWS, atol=1e-6)
        assert cloud.assumed.notes == (
            f"its header says POINTS 20, but WIDTH {width} and HEIGHT {height}",
        )
    assert not read(save_pcd(tmp_path, WIDTH=5, HEIGHT=4)).assumed.notes


def test_compressed_pcd_with_another_number_of_points(tmp_path):
    import pypcd4

    path = tmp_path / "a.pcd"
    xyz = np.tile(ROWS, (10, 1)).astype(np.float32)  # others are not packed
    cloud = pypcd4.PointCloud.from_xyz_points(xyz)
    cloud.save(path, encoding=pypcd4.Encoding.BINARY_COMPRESSED)
    np.testing.assert_array_equal(read(path).xyz, xyz)
    whole = path.read_bytes()
    assert b"DATA binary_compressed" in whole
    for n in (1, 199, 201):
        path.write_bytes(whole.replace(b"POINTS 200", b"POINTS %d" % n))
        assert f"its data are 200 points, and its header says {n}" in refused(path)


def test_withheld_points_of_las_are_left_out(tmp_path):
    laspy = pytest.importorskip("laspy")
    data = laspy.create(point_format=6, file_version="1.4")
    data.header.scales = [0.001] * 3
    data.x, data.y, data.z = ROWS.T
    data.withheld = np.arange(len(ROWS)) < 6
    data.write(tmp_path / "a.las")
    cloud = read(tmp_path / "a.las")
    np.testing.assert_allclose(cloud.xyz, ROWS[6:], atol=1e-3)
    assert cloud.assumed.dropped == {"withheld": 6}
    data.withheld = np.ones(len(ROWS), dtype=bool)
    data.write(tmp_path / "a.las")
    assert "all points are marked as withheld" in refused(tmp_path / "a.las")


def test_messages_about_tables_have_no_advice_of_numpy(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3\n4 5 6\n7 8 9 10\n")
    assert refused(tmp_path / "a.txt").endswith(
        "the number of columns changed from 3 to 4 at row 3"
    )
    for wrong in ("5", 5.5, 0):
        with pytest.raises(InputError, match="n_points"):
            read(tmp_path / "a.txt", n_points=wrong)
