"""Sampling, normalisation and axes."""

from __future__ import annotations

import numpy as np
import pytest

from budwood.errors import InputError, UnknownNameError
from budwood.points import sampling
from budwood.points.axes import to_up
from budwood.points.io import Cloud, make_cloud
from budwood.points.sampling import (
    SAMPLERS,
    far_points,
    lidar_points,
    normalize,
    random_points,
    repeated_points,
    sample,
    visible_points,
    voxel_points,
    without_duplicates,
)
from tests.reference import grouping_reference as reference


def ball(n=3000, seed=0):
    xyz = np.random.default_rng(seed).normal(size=(n, 3))
    return xyz / np.linalg.norm(xyz, axis=1, keepdims=True)


@pytest.mark.parametrize("name", SAMPLERS.names())
@pytest.mark.parametrize("n", [1, 2, 64, 2999, 3000, 9999])
def test_every_sampler(name, n):
    cloud = make_cloud(ball(), ball(seed=1).clip(0, 1))
    got = sample(cloud, n, name, seed=5)
    assert 1 <= len(got) <= min(n, 3000)
    assert len(np.unique(got.xyz, axis=0)) == len(got)
    assert len(got.rgb) == len(got)
    assert np.array_equal(got.xyz, sample(cloud, n, name, seed=5).xyz)
    if name in ("random", "farthest"):
        assert len(got) == min(n, 3000)
    if name == "random" and n == 64:
        assert not np.array_equal(got.xyz, sample(cloud, n, name, seed=6).xyz)


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_every_sampler_takes_one_point_and_equal_points(name):
    for xyz in (np.zeros((1, 3)), np.ones((7, 3)), np.full((7, 3), 5e6)):
        assert 1 <= len(sample(make_cloud(xyz), 4, name)) <= 4


def test_far_points_are_far():
    xyz = ball()
    gaps = []
    for indices in (far_points(xyz, 40), random_points(xyz, 40)):
        chosen = xyz[indices]
        distance = np.linalg.norm(chosen[:, None] - chosen[None], axis=2) + 9 * np.eye(40)
        gaps.append(distance.min())
    assert gaps[0] > 3 * gaps[1]
    assert gaps[0] > 0.3


def test_lidar_sees_one_side_in_lines():
    xyz = ball(20_000)
    seen = xyz[lidar_points(xyz, 200, seed=1, up="z")]
    assert 100 < len(seen) <= 200
    # One hemisphere, along the view, which is horizontal.
    view = seen.mean(axis=0)
    assert np.linalg.norm(view) > 0.3 and abs(view[2]) < 0.1
    assert (seen @ view > 0).mean() > 0.95
    # Lines: heights crowd around as many values as beams hit the ball.
    heights = np.sort(seen[:, 2])
    turned = to_up(xyz, "z", "y")
    assert np.array_equal(
        lidar_points(turned, 200, seed=1, up="y"), lidar_points(xyz, 200, 1, up="z")
    )
    assert len(heights) == len(seen)


@pytest.mark.parametrize("n_points", [1, 9, 60, 900])
def test_lidar_agrees_with_reference(n_points):
    xyz = ball(300, seed=4) * (1, 0.5, 0.8)
    xyz[100:120] = xyz[:20]  # at the same distance: the lower index
    angle = np.random.default_rng(3).uniform(0, 2 * np.pi)
    heading = np.array([np.cos(angle), np.sin(angle), 0.0])
    want = reference.lidar(xyz, n_points, heading, np.radians(26.9) / 63, 0.2)
    got = lidar_points(xyz, n_points, seed=3, up="z")
    if len(want) > n_points:
        assert len(got) == n_points and set(got) <= set(want)
    else:
        assert got.tolist() == want


@pytest.mark.parametrize("name", ["farthest", "lidar"])
def test_large_clouds_are_thinned_to_voxels(name, monkeypatch):
    monkeypatch.setattr(sampling, "FARTHEST_POOL", 2000)
    monkeypatch.setattr(sampling, "LIDAR_POOL", 2000)
    xyz = ball(5000)
    got = SAMPLERS.get(name)(xyz, 60)
    assert 30 < len(got) <= 60 and len(set(got.tolist())) == len(got)
    if name == "farthest":
        chosen = xyz[got]
        gaps = np.linalg.norm(chosen[:, None] - chosen[None], axis=2) + 9 * np.eye(60)
        assert gaps.min() > 0.2
    for odd in (np.zeros((5000, 3)), np.repeat(ball(3), 2000, axis=0)):
        assert 1 <= len(SAMPLERS.get(name)(odd, 60)) <= 60


@pytest.mark.parametrize("least", [1, 50, 700, 5000])
@pytest.mark.parametrize("stretch", [(1, 1, 1), (1, 1, 0), (1, 0, 0)])
def test_voxels(least, stretch):
    xyz = ball(2000, seed=1) * stretch + 4e6
    got = voxel_points(xyz, least)
    assert np.array_equal(got, np.unique(got)) and min(least, 1900) <= len(got) <= 2000
    if least == 50:
        assert len(got) < 1000
        # All places are represented.
        gaps = np.linalg.norm(xyz[:, None] - xyz[got][None], axis=2).min(axis=1)
        assert gaps.max() < 1.0
    assert voxel_points(np.full((9, 3), 2.0), 4).tolist() == [0]
    doubled = np.repeat(ball(3), 2000, axis=0)
    assert voxel_points(doubled, 4).tolist() == [0, 2000, 4000]


def test_visible_points_are_near():
    xyz = ball()
    indices = visible_points(xyz, 3000, seed=2, hidden=0.75)
    assert len(indices) == 750
    centre = xyz[indices].mean(axis=0)
    assert np.linalg.norm(centre) > 0.5
    for hidden in (-0.1, 1.0):
        with pytest.raises(InputError, match="outside"):
            visible_points(xyz, 5, hidden=hidden)


def test_normalize():
    cloud = normalize(make_cloud(ball(50) * 3 + 5e6))
    np.testing.assert_allclose(cloud.xyz.mean(axis=0), 0, atol=1e-8)
    assert np.linalg.norm(cloud.xyz, axis=1).max() == pytest.approx(1)
    assert normalize(make_cloud(np.full((4, 3), 7.0))).xyz.tolist() == [[0.0] * 3] * 4


def test_duplicates():
    xyz = ball(6)
    doubled = make_cloud(np.vstack([xyz, xyz[::-1], xyz[:2]]))
    assert np.array_equal(without_duplicates(doubled).xyz, xyz)
    grid = make_cloud(np.random.default_rng(0).integers(-2, 2, (500, 3)) * -0.5)
    _, first = np.unique(grid.xyz, axis=0, return_index=True)
    assert np.array_equal(without_duplicates(grid).xyz, grid.xyz[np.sort(first)])
    assert repeated_points(np.array([[0.0, 1, 2], [-0.0, 1, 2], [2, 1, 0]])).tolist() == [0, 1, 0]
    narrow = Cloud(xyz.astype(np.float32))  # type: ignore[arg-type]
    assert without_duplicates(narrow) is narrow


def test_refusals():
    cloud = make_cloud(ball(9))
    for n in (0, -3, 2.5, True):
        with pytest.raises(InputError, match="whole number of at least 1|give at least 1"):
            sample(cloud, n)
    for name in SAMPLERS.names():
        for seed in (-1, 0.5):
            with pytest.raises(InputError, match=f"seed={seed} is out of range"):
                sample(cloud, 3, name, seed)
    with pytest.raises(UnknownNameError, match="did you mean 'random'"):
        sample(cloud, 3, "randm")
