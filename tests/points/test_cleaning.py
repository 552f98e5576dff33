"""Strays, the ground, and the axis that points up."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from budwood.errors import InputError, MissingPackageError
from budwood.points import load_clouds
from budwood.points.axes import AXES, to_up
from budwood.points.cleaning import without_ground, without_strays
from budwood.points.inputs import InputOptions
from budwood.points.io import make_cloud
from budwood.points.sampling import normalize
from tests.points import layouts


def radius(cloud):
    return float(np.linalg.norm(normalize(cloud).xyz, axis=1).mean())


# --- the axis -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("current", "wanted"), [*itertools.product(AXES, AXES)])
def test_axes_turn_and_do_not_mirror(current, wanted):
    eye = np.eye(3)
    turned = to_up(eye, current, wanted)
    assert np.linalg.det(turned) == pytest.approx(1)
    sign = (-1 if current[0] == "-" else 1) * (-1 if wanted[0] == "-" else 1)
    assert turned["xyz".index(current[-1])]["xyz".index(wanted[-1])] == sign
    assert np.array_equal(to_up(turned, wanted, current), eye)


def test_scans_and_cameras_as_before():
    x, y, z = np.random.default_rng(0).normal(size=(3, 9))
    points = np.stack([x, y, z], axis=1)
    assert np.array_equal(to_up(points, "z", "y"), np.stack([x, z, -y], axis=1))
    assert np.array_equal(to_up(points, "y", "z"), np.stack([x, -z, y], axis=1))
    assert np.array_equal(to_up(points, "-y", "y"), np.stack([x, -y, -z], axis=1))  # y down
    for axis in ("w", "+y", "", "zz"):
        with pytest.raises(InputError, match="give one of x, -x, y, -y, z, -z"):
            to_up(points, axis, "y")


# --- repeated points ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(1.2, 0, 1.8), (9999, 9999, 9999), (-1000, 0, 0), (1e10, 0, 0)])
@pytest.mark.parametrize("n_copies", [50, 500, 5000])
def test_rows_that_repeat_one_place_count_once(place, n_copies):
    car = layouts.car(1024) + np.array([15, -6, 0])
    damaged = np.vstack([car, np.tile(place, (n_copies, 1))])
    np.random.default_rng(0).shuffle(damaged)
    cloud = InputOptions(up="z").read(damaged)
    assert cloud.assumed.dropped == {"repeated": n_copies - 1, "stray": 1}
    assert len(cloud) == 1024
    kept = InputOptions(up="z", strays="keep").read(damaged)
    assert len(kept) == 1025 and kept.assumed.dropped == {"repeated": n_copies - 1}


def test_repeats_below_the_ground_leave_the_ground():
    rng = np.random.default_rng(0)
    car = layouts.car(800, at=(0, 0, 0))
    ground = np.column_stack([rng.uniform(-3, 3, (600, 2)), rng.normal(0, 0.01, 600)])
    ground[:, 2] += car[:, 2].min()
    scene = np.vstack([car, ground, np.tile([0.5, 0.5, -4], (200, 1))])
    cloud = InputOptions(up="z", remove_ground=True).read(make_cloud(scene).assuming(units="m"))
    assert cloud.assumed.dropped["repeated"] == 199 and cloud.assumed.dropped["ground"] > 500


# --- strays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_points", [16, 40, 128, 1000, 50_000])
@pytest.mark.parametrize(
    "strays",
    [
        [[20.0, 0, 0]],
        [[0, 0, 20.0]],
        [[-8.0, 3, 0]],
        [[1e6, 0, 0]],
        [[20.0, 0, 0], [-15, 9, 3], [9, -30, 0], [0, 12, 0], [40, 40, 1]],
    ],
    ids=["x", "z", "near", "damaged", "several"],
)
def test_strays_are_left_out(strays, n_points):
    if n_points < 1000 and np.linalg.norm(strays[0]) < 10:
        strays = [[18, 6, 0]]  # sparse clouds get more room
    strays = strays[: max(1, n_points // 16)]
    xyz = layouts.car(n_points).astype(np.float64)
    order = np.random.default_rng(0).permutation(n_points + len(strays))
    rows = np.vstack([xyz, np.add(strays, xyz.mean(axis=0))])[order]
    cloud = without_strays(make_cloud(rows))
    assert cloud.assumed.dropped == {"stray": len(strays)}
    assert np.array_equal(cloud.xyz, rows[order < n_points])
    if n_points == 1000:
        assert radius(make_cloud(rows)) < 0.6 * radius(cloud)


def test_the_origin_of_a_sensor_is_a_stray():
    rows = np.vstack([layouts.car(200), np.zeros((1, 3))])
    cloud = without_strays(make_cloud(rows))
    assert cloud.assumed.dropped == {"stray": 1}


def test_what_is_no_stray():
    rng = np.random.default_rng(0)
    base = rng.uniform(-0.1, 0.1, size=(2000, 3))
    pole = np.stack([np.zeros(60), np.zeros(60), np.linspace(0.1, 2.5, 60)], axis=1)
    broom = make_cloud(np.vstack([base, pole]))
    assert len(without_strays(broom)) == len(broom)
    twice = make_cloud(np.vstack([base, base[:200] + 9]))  # a tenth is no accident
    assert len(without_strays(twice)) == len(twice)
    few = make_cloud(np.vstack([layouts.car(9), [[99, 0, 0]]]))
    assert len(without_strays(few)) == len(few)
    same = make_cloud(np.vstack([np.ones((99, 3)), [[2, 2, 2]]]))
    assert len(without_strays(same)) == len(same)


@pytest.mark.parametrize("n_points", [1000, 60, 20])
def test_the_far_end_of_a_car_seen_from_behind(n_points):
    rng = np.random.default_rng(0)
    back = np.stack([np.zeros(n_points), *rng.uniform(-0.8, 0.8, (2, n_points))], axis=1)
    roof = np.array([[1.1, 0, 0.8], [2.3, 0.3, 0.8], [3.2, -0.3, 0.6], [4.2, 0.2, 0.5]])
    cloud = make_cloud(np.vstack([back, roof]))
    assert len(without_strays(cloud)) == len(cloud)


@pytest.mark.parametrize("n_points", [4096, 128, 32])
def test_whole_objects_stay_whole(n_points):
    rng = np.random.default_rng(0)
    lost = 0
    clouds = load_clouds().xyz[::5]
    for xyz in clouds:
        thin = xyz[rng.permutation(len(xyz))[:n_points]].astype(np.float64)
        lost += bool(without_strays(make_cloud(thin)).assumed.dropped)
    assert lost <= 0.005 * len(clouds)


# --- the ground -----------------------------------------------------------------------------------


def on_ground(n_ground=400, slope=0.0, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    car = layouts.car(1000)
    flat = rng.uniform(-1, 1, size=(n_ground, 2)) * (4, 3) + car[:, :2].mean(axis=0)
    bottom = car[:, 2].min() - 0.25
    height = (
        bottom + slope * (flat[:, 0] - car[:, 0].mean()) + rng.normal(scale=noise, size=n_ground)
    )
    return car, np.hstack([flat, height[:, None]])


@pytest.mark.parametrize("up", AXES)
@pytest.mark.parametrize(("n_ground", "slope"), [(400, 0.0), (150, 0.0), (3000, 0.03)])
def test_the_ground_is_removed(n_ground, slope, up):
    pytest.importorskip("sklearn")
    car, ground = on_ground(n_ground, slope)
    rows = to_up(np.vstack([car, ground]), "z", up)
    cloud = without_ground(make_cloud(rows).assuming(units="m"), up)
    kept = to_up(cloud.xyz, up, "z")
    n_ground_left = (kept[:, 2] < car[:, 2].min() - 0.1).sum()
    assert n_ground_left <= 0.01 * n_ground
    assert len(kept) >= 0.97 * len(car)
    assert cloud.assumed.dropped["ground"] == len(rows) - len(cloud)


def test_units_do_not_matter():
    pytest.importorskip("sklearn")
    car, ground = on_ground()
    rows = np.vstack([car, ground])
    for scale in (1e-3, 1.0, 39.37):
        cloud = without_ground(make_cloud(rows * scale), "z")
        assert 380 <= cloud.assumed.dropped["ground"] <= 440


def test_far_from_the_origin():
    pytest.importorskip("sklearn")
    car, ground = on_ground()
    cloud = make_cloud(np.vstack([car, ground]).astype(np.float64) + np.array([458e3, 5428e3, 110]))
    assert 395 <= without_ground(cloud.assuming(units="m"), "z").assumed.dropped["ground"] <= 420


def test_no_ground():
    pytest.importorskip("sklearn")
    _, ground = on_ground()
    ball = np.random.default_rng(0).normal(size=(800, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    cloud = without_ground(make_cloud(ball), "z")
    assert len(cloud) == 800
    assert cloud.assumed.notes == ("no ground was found, and nothing was removed",)
    with pytest.raises(InputError, match="nothing is left above the ground"):
        without_ground(make_cloud(ground).assuming(units="m"), "z")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'budwood\[points\]'"):
        without_ground(make_cloud(layouts.car(99)), "z")
