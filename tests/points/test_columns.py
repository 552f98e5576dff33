"""What tables without names hold: colours or other numbers, a time or an index first, float16."""

from __future__ import annotations

import numpy as np
import pytest

from budwood.errors import InputError
from budwood.points.io import cloud_of, read
from budwood.points.io.columns import guess_columns
from tests.points import layouts

N = 400
XYZ = layouts.car(N).astype(np.float64)
RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 230, (N, 1))
SHADE = RNG.uniform(0.3, 1, (N, 1))
INTENSITY = RNG.integers(0, 256, N)
RGB = GREY + RNG.integers(0, 25, (N, 3))


def guessed(*columns):
    return guess_columns(np.column_stack(columns), "table")


@pytest.mark.parametrize(
    "others",
    [
        (RNG.integers(0, 150, N), np.arange(N) % 64, RNG.integers(0, 6, N)),  # Livox
        (INTENSITY, RNG.integers(0, 12, N), RNG.integers(0, 20, N)),  # label and instance
        (INTENSITY, RNG.choice([10, 40, 252], N), RNG.integers(0, 200, N)),
        (INTENSITY, np.arange(N) % 128, np.arange(N) // 10),  # ring, milliseconds
        (RNG.integers(0, 2, (N, 3)),),
        (np.tile([255, 0, 0], (N, 1)),),
    ],
)
def test_whole_numbers_that_may_be_no_colours(others, tmp_path):
    letters, note = guessed(XYZ, *others)
    assert letters == "xyz___"
    assert note.startswith("colours could be in columns 4 to 6, so none are used; name the columns")
    np.savetxt(tmp_path / "a.txt", np.column_stack([XYZ, *others]))
    cloud = read(tmp_path / "a.txt", columns="xyzrgb")
    assert cloud.rgb is not None and not cloud.assumed.notes


@pytest.mark.parametrize(
    "rgb",
    [
        RGB,
        RGB * 257,
        RNG.integers(0, 256, (N, 3)),
        (SHADE * [200, 30, 20]).round(),
        GREY // 4 + RNG.integers(0, 6, (N, 3)),  # a dark cloud
        RNG.integers(0, 256, (12, 3))[RNG.integers(0, 12, N)],  # a palette
        np.full((N, 3), 128),
        RNG.random((N, 3)),
    ],
)
def test_colours(rgb):
    assert guessed(XYZ, rgb) == ("xyzrgb", None)


def test_colours_beside_labels():
    label, instance = RNG.integers(0, 12, N), RNG.integers(0, 50, N)
    assert guessed(XYZ, RGB, label) == ("xyzrgb_", None)
    assert guessed(XYZ, RGB, label, instance) == ("xyzrgb__", None)
    letters, note = guessed(XYZ, RNG.integers(0, 256, (N, 3)), INTENSITY)
    assert letters == "xyz____" and "columns 4 to 6 or 5 to 7" in note


@pytest.mark.parametrize("header", ["x y z intensity label instance", "# x y z i label instance"])
def test_a_header_says_what_is_no_colour(header, tmp_path):
    table = np.column_stack([XYZ, RNG.integers(0, 256, (N, 3))])
    np.savetxt(tmp_path / "a.txt", table, header=header, comments="")
    cloud = read(tmp_path / "a.txt")
    assert cloud.rgb is None and not cloud.assumed.notes


@pytest.mark.parametrize(
    "first",
    [
        1.6e9 + np.arange(N) * 1e-5,
        1.6e9 + np.sort(RNG.random(N)),
        np.full(N, 1.6e9),
        np.arange(N) * 0.1 + 3,
        np.arange(5, N + 5),
        np.arange(N, dtype=np.float32) * np.float32(0.1) + 1000,
    ],
)
def test_a_time_first_is_refused(first, tmp_path):
    np.savetxt(tmp_path / "a.txt", np.column_stack([first, XYZ, INTENSITY]))
    reason = "its first column looks like a time or an index; .* columns='_xyz'"
    with pytest.raises(InputError, match=reason):
        read(tmp_path / "a.txt")
    np.testing.assert_allclose(read(tmp_path / "a.txt", columns="_xyz_").xyz, XYZ)


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (np.zeros(N), "is 0 in all rows; if it is a time or an index"),
        (np.arange(N) // 100, "only rises"),
        (np.arange(N) // 16 * 1e-4, "only rises"),
        (np.sort(RNG.random(N)), "only rises"),
        (RNG.integers(0, 4, N), "is of whole numbers"),
        (RNG.permutation(N), "is of whole numbers"),
    ],
)
def test_a_first_column_that_may_be_no_coordinate(first, says, tmp_path):
    table = np.column_stack([first, XYZ, INTENSITY / 255]).astype("<f4")
    table.tofile(tmp_path / "a.bin")
    cloud = read(tmp_path / "a.bin")
    (note,) = cloud.assumed.notes
    assert f"the first column {says}" in note and "columns='_xyz'" in note
    assert not read(tmp_path / "a.bin", columns="_xyz_").assumed.notes


def test_profiles_and_clouds_in_order():
    """What rises evenly may be x, if it begins below 0, or if intensities stand behind it."""
    x, height = np.linspace(-30, 30, 640), RNG.normal(size=640)
    assert "only rises" in guessed(x, height, height, RNG.random(640) * 9 - 3)[1]
    assert guessed(x + 30, height, height, RNG.random(640)) == ("xyz_", None)
    assert guessed(np.zeros(640), height, height, RNG.random(640)) == ("xyz_", None)
    with pytest.raises(InputError, match="looks like a time or an index.*columns='xyz_' if it is"):
        guessed(x + 30, height, height, height)
    millimetres = np.sort(RNG.uniform(4.5e8, 4.6e8, 640))  # UTM
    assert "only rises" in guessed(millimetres, height, height, height)[1]


def test_coordinates_that_rise_or_are_whole():
    by_x = XYZ[np.argsort(XYZ[:, 0])]
    assert guessed(by_x, RGB) == ("xyzrgb", None)
    assert guessed(by_x, INTENSITY) == ("xyz_", None)
    assert guessed((1000 * by_x).round()[::-1], INTENSITY) == ("xyz_", None)
    assert guessed(by_x) == ("xyz", None)
    assert cloud_of(by_x, "array").assumed.notes == ()


@pytest.mark.parametrize("n_points", [60, 211, 6000])
@pytest.mark.parametrize("layout", layouts.BINS)
def test_float16_is_refused(layout, n_points, tmp_path):
    make, letters = layouts.BINS[layout]
    for xyz in (layouts.car(n_points), layouts.frame(n_points)):
        table = make(xyz)
        values = table.astype("<f2").ravel()
        values[: len(values) // 2 * 2].tofile(tmp_path / "a.bin")
        for columns in (None, "xyz"):
            if columns is None or len(values) // 2 % 3 == 0:
                with pytest.raises(InputError, match="seems to hold float16, not float32"):
                    read(tmp_path / "a.bin", columns=columns)
        # What float16 can hold, and other round numbers, are float32 here.
        for rounded in (table.astype("<f2"), (table * 256).round() / 256, table.round(2)):
            rounded.astype("<f4").tofile(tmp_path / "a.bin")
            assert len(read(tmp_path / "a.bin", columns=letters)) == n_points


def test_other_types_are_refused_with_columns_too(tmp_path):
    for dtype in ("<f8", "<i2", "<i4"):
        (1000 * layouts.car(300)).astype(dtype).tofile(tmp_path / "a.bin")
        with pytest.raises(InputError, match="holds no float32 coordinates"):
            read(tmp_path / "a.bin", columns="xyz")
    table = np.column_stack([XYZ, np.arange(N)]).astype("<f4")
    table.view("<u4")[:, 3] = np.arange(N)  # a counter beside coordinates
    table.tofile(tmp_path / "a.bin")
    assert len(read(tmp_path / "a.bin", columns="xyz_")) == N
