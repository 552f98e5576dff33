"""Tables in text: headers with units, in comments or not, empty cells, and quotes."""

from __future__ import annotations

import numpy as np
import pytest

from budwood.points.io import cloud_of, read
from budwood.points.io.fields import header_letters
from budwood.points.io.units import unit_of
from tests.points.files import refused

ROWS = np.random.default_rng(3).normal(size=(20, 3)).round(3)


def rows(form, scale=1):
    return "\n".join(form.format(*(row * scale).round(6), i=i) for i, row in enumerate(ROWS)) + "\n"


def written(folder, text):
    path = folder / "a.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("# TIME (ns), RANGE (mm), X (m), Y (m), Z (m)", "7000,8,{},{},{}"),
        ("# Z (m), Y (m), X (m)", "{2},{1},{0}"),
        ("#Z [m];Y [m];X [m]", "{2};{1};{0}"),
        ("# Z (m) Y (m) X (m)", "{2} {1} {0}"),
        ("# Point ID\tZ [m]\tY [m]\tX [m]", "{i}\t{2}\t{1}\t{0}"),
        ("# Z, Y, X", "{2} {1} {0}"),
        ("# z y x", "{2},{1},{0}"),
        ("# z,y,x,", "{2},{1},{0},"),
        ("# Columns: z y x intensity", "{2} {1} {0} 7"),
        ("# z y x\n# written by hand", "{2} {1} {0}"),
        ("## z y x ##", "{2} {1} {0}"),
        ("Z (m) Y (m) X (m)", "{2} {1} {0}"),
        ("z, y, x", "{2} {1} {0}"),
        ("z y x", "{2},{1},{0}"),
        ("z_m,y_m,x_m", "{2},{1},{0}"),
        ('"z","y","x"', '"{2}","{1}","{0}"'),
        ('"label, by hand","z","y","x"', '"a, b","{2}", "{1}","{0}"'),
        ("field.z,field.y,field.x", "{2},{1},{0}"),
        ("z,y,x,note", "{2},{1},{0},"),
    ],
)
def test_headers_name_the_columns(header, form, tmp_path):
    cloud = read(written(tmp_path, f"{header}\n{rows(form)}"))
    np.testing.assert_allclose(cloud.xyz, ROWS, atol=1e-9)
    assert cloud.assumed.columns is None and not cloud.assumed.notes


@pytest.mark.parametrize("unit", ["mm", "cm", "ft", "km"])
@pytest.mark.parametrize(
    "header", ["# X ({0}), Y ({0}), Z ({0})", "X[{0}],Y[{0}],Z[{0}]", "x_{0},y_{0},z_{0}"]
)
def test_headers_name_units(header, unit, tmp_path):
    path = written(tmp_path, header.format(unit) + "\n" + rows("{},{},{}", 1000))
    cloud = read(path, box=[-9e3, -9e3, -9e3, 9e3, 9e3, 9e3])
    np.testing.assert_allclose(cloud.xyz, 1000 * ROWS, atol=1e-5)
    assert cloud.assumed.units == unit and not cloud.assumed.notes


def test_units_of_structured_arrays(tmp_path):
    names = ("x (mm)", "y (mm)", "z (mm)")
    fields = np.rec.fromarrays(1000 * ROWS.T, names=list(names))
    cloud = cloud_of(fields, "array")
    assert cloud.assumed.units == "mm"
    np.savez(tmp_path / "a.npz", **dict(zip(names, 1000 * ROWS.T)))
    assert read(tmp_path / "a.npz").assumed.units == "mm"
    both = np.rec.fromarrays([*ROWS.T, 1000 * ROWS[:, 0]], names=["x", "y", "z", "x_mm"])
    np.testing.assert_array_equal(cloud_of(both, "array").xyz, ROWS)


def test_units_that_are_unknown_or_no_lengths(tmp_path):
    assert [unit_of(name) for name in ("X (mm)", "y_ft", "Z [ m ]", "z")] == ["mm", "ft", "m", None]
    cloud = read(written(tmp_path, "X (px),Y (px),Z (px)\n" + rows("{},{},{}")))
    np.testing.assert_allclose(cloud.xyz, ROWS)
    assert cloud.assumed.units is None
    assert cloud.assumed.notes == ("the unit of its coordinates, 'px', is not known and not used",)
    for unit, known in (("m a.s.l.", "m"), ("m NHN", "m"), ("US ft", "m"), ("height", "m")):
        path = written(tmp_path, f"X (m),Y (m),Z ({unit})\n" + rows("{},{},{}"))
        if unit == "US ft":
            assert "several units" in refused(path)
        else:
            assert read(path).assumed.units == known
    for unit, known in (("µm", "micron"), ("US ft", "us-ft"), ("ftUS", "us-ft"), ("Meters", "m")):
        path = written(tmp_path, f"X ({unit}),Y ({unit}),Z ({unit})\n" + rows("{},{},{}"))
        assert read(path).assumed.units == known
    path = written(tmp_path, "X (deg),Y (deg),Z (m)\n" + rows("{},{},{}"))
    assert "coordinates in degrees, which are no lengths" in refused(path)
    path = written(tmp_path, "X (mm),Y (mm),Z (m)\n" + rows("{},{},{}"))
    assert "several units of its coordinates (m, mm)" in refused(path)


def test_easting_and_northing(tmp_path):
    assert header_letters(["E", "N", "Z"]) == header_letters(["east", "north", "h"]) == "xyz"
    assert header_letters(["x", "y", "z", "e", "n", "height"]) == "xyz___"
    path = written(tmp_path, "Height [m],Northing [m],Easting [m]\n" + rows("{2},{1},{0}"))
    cloud = read(path)
    np.testing.assert_allclose(cloud.xyz, ROWS)
    assert (cloud.assumed.up, cloud.assumed.units) == ("z", "m")


@pytest.mark.parametrize("comment", ["z y x", "z, y, x, intensity, label", "order: z, y, x"])
def test_comments_that_do_not_fit_the_rows(comment, tmp_path):
    path = written(tmp_path, f"# {comment}\n" + rows("{},{},{},5"))
    (note,) = read(path).assumed.notes
    assert f"the comment {comment!r} names other columns than the 4" in note
    assert read(path, columns="xyz_").assumed.notes == ()


def test_comments_that_name_columns_wrongly(tmp_path):
    for names in ("x,y,z,X", "x,y,z,r"):
        path = written(tmp_path, f"# {names}\n" + rows("{},{},{},5"))
        assert f"its header {names!r} must name x, y, z once" in refused(path)
    path = written(tmp_path, "# lon, lat, alt\n" + rows("{},{},{}"))
    assert "degrees are not lengths" in refused(path)
    path = written(tmp_path, "# a table, of three, columns\n" + rows("{},{},{}"))
    assert read(path).assumed.notes == ()


@pytest.mark.parametrize("header", ["x,y,z\n", "# x,y,z\n", ""])
@pytest.mark.parametrize("empty", ["", '""', "NA", " null "])
def test_empty_cells_are_nan(header, empty, tmp_path):
    gone = f"{empty},{empty},{empty}\n"
    path = written(tmp_path, header + gone + rows("{},{},{}") + gone)
    cloud = read(path)
    np.testing.assert_allclose(cloud.xyz, ROWS)
    assert cloud.assumed.dropped == {"no return": 2}
    path = written(tmp_path, header + rows("{},{},{}") + f"1,{empty},3\n")
    assert "1 of 21 points have NaN or infinite coordinates" in refused(path)
    np.testing.assert_allclose(read(path, invalid="drop").xyz, ROWS)
    path = written(tmp_path, header + rows("{},{},{}") + "1,two,3\n")
    assert "could not convert string 'two'" in refused(path)


@pytest.mark.parametrize("columns", [None, "xyz_"])
def test_a_quote_that_is_not_closed_joins_no_rows(columns, tmp_path):
    names = ["oak"] * 20
    names[3] = '"oak'
    header = "x,y,z,name\n" if columns is None else ""
    body = "".join(f"{x},{y},{z},{name}\n" for (x, y, z), name in zip(ROWS, names))
    cloud = read(written(tmp_path, header + body), columns=columns)
    np.testing.assert_allclose(cloud.xyz, ROWS)
    quoted = body.replace(f"{ROWS[0][0]},", f'"{ROWS[0][0]}",', 1)
    message = refused(written(tmp_path, header + quoted), columns=columns)
    assert "has 20 rows, and 4 if read with quotes: one is not closed" in message


def test_empty_last_cells(tmp_path):
    for header in ("x,y,z,i\n", "# x,y,z,i\n", ""):
        text = header + rows("{},{},{},") + "1,2,3,4\n"
        assert len(read(written(tmp_path, text))) == 21
        text = header + rows("{},{},{},5") + "1,2,3,\n"
        assert len(read(written(tmp_path, text))) == 21
    path = written(tmp_path, "i,x,y,z\n" + rows("5,{},{},{}") + "5,1,2,\n")
    assert "1 of 21 points" in refused(path)
    np.testing.assert_allclose(
        read(written(tmp_path, "x,y,z,\n" + rows("{},{},{},")), columns="xyz").xyz, ROWS
    )


def test_colours_that_are_empty(tmp_path):
    text = "x,y,z,r,g,b\n" + rows("{},{},{},9,9,200").replace("9,9,200", ",,", 1)
    assert "colours of 1 of 20 points are empty or NaN" in refused(written(tmp_path, text))


def test_an_index_above_which_pandas_writes_nothing(tmp_path):
    path = written(tmp_path, ",0,1,2\n" + rows("{i},{},{},{}"))
    assert "its first column counts the rows" in refused(path)
    np.testing.assert_allclose(read(path, columns="_xyz").xyz, ROWS)
