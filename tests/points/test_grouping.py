"""Grouping against the reference, its promises from one point up, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from budwood.errors import InputError, ShapeError
from budwood.points import grouping
from budwood.points.grouping import (
    Grouping,
    ball,
    farthest_points,
    farthest_points_pointnet2,
    gather,
    nearest,
)
from tests.reference import grouping_reference as reference


def cloud(n, batch=1, seed=0, grid=None):
    rng = torch.Generator().manual_seed(seed)
    xyz = torch.randn(batch, n, 3, generator=rng)
    return xyz if grid is None else (xyz * grid).round() / grid


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("start", [0, -1])
def test_farthest_agrees_with_reference(n, start):
    xyz = cloud(n, batch=3, seed=n)
    start = start % n
    for n_samples in {1, n // 2 or 1, n}:
        got = farthest_points(xyz, n_samples, start)
        want = [reference.farthest(points.tolist(), n_samples, start) for points in xyz]
        assert got.tolist() == want


def test_farthest_never_repeats_where_points_do():
    xyz = torch.ones(2, 9, 3)
    xyz[1, 4:] = 2.0
    got = farthest_points(xyz, 9)
    assert all(sorted(row) == list(range(9)) for row in got.tolist())
    assert got[1, :2].tolist() == [0, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 130, 700])
@pytest.mark.parametrize("grid", [None, 2.0])  # on a grid, distances tie everywhere
def test_pointnet2_agrees_bit_for_bit(n, grid):
    xyz = cloud(n, batch=2, seed=n, grid=grid)
    got = farthest_points_pointnet2(xyz, min(n + 2, 24))
    want = [reference.pointnet2_farthest(p.tolist(), min(n + 2, 24)) for p in xyz]
    assert got.tolist() == want


def test_pointnet2_skips_points_near_the_origin():
    xyz = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0, 0.03, 0], [0, 0.5, 0]]])
    assert farthest_points_pointnet2(xyz, 4).tolist() == [[0, 3, 0, 0]]
    assert sorted(farthest_points(xyz, 4)[0].tolist()) == [0, 1, 2, 3]
    nothing = torch.zeros(1, 5, 3)
    assert farthest_points_pointnet2(nothing, 3).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("n", [1, 3, 50])
def test_nearest_agrees_with_reference(n):
    xyz, queries = cloud(n, 2, seed=1), cloud(4, 2, seed=2)
    for k in {1, min(7, n), n}:
        got = nearest(xyz, queries, k)
        want = [
            [reference.nearest(p.tolist(), q.tolist(), k) for q in qs]
            for p, qs in zip(xyz, queries)
        ]
        assert got.tolist() == want


def test_tree_and_chunks_agree_with_brute_force(monkeypatch):
    pytest.importorskip("scipy")
    xyz, queries = cloud(500, 2, seed=1), cloud(40, 2, seed=2)
    want = nearest(xyz, queries, 9)
    monkeypatch.setattr(grouping, "CHUNK", 3000)
    assert torch.equal(nearest(xyz, queries, 9), want)
    monkeypatch.setattr(grouping, "CHUNK", 1 << 24)
    monkeypatch.setattr(grouping, "TREE_ABOVE", 1)
    assert torch.equal(nearest(xyz, queries, 9), want)
    assert nearest(xyz, queries, 1).shape == (2, 40, 1)
    monkeypatch.setattr(grouping, "is_installed", lambda package: False)
    assert torch.equal(nearest(xyz, queries, 9), want)


def test_distances_survive_a_far_origin():
    # |a|² − 2ab + |b|² in float32 would see only noise here.
    xyz = cloud(50) * 1e-3 + 10.0
    got = nearest(xyz, xyz, 1)
    assert got[0, :, 0].tolist() == list(range(50))


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("radius", [0.05, 0.6, 9.0])
@pytest.mark.parametrize("tree_after", [0, 1 << 21])
def test_strict_ball_agrees_with_pointnet2(k, radius, tree_after, monkeypatch):
    monkeypatch.setattr(grouping, "BALL_TREE_AFTER", tree_after)
    xyz, queries = cloud(25, 2, seed=1), cloud(6, 2, seed=2)
    got = ball(xyz, queries, radius, k, strict=True)
    want = [
        [reference.pointnet2_ball(p.tolist(), q.tolist(), radius, k) for q in qs]
        for p, qs in zip(xyz, queries)
    ]
    assert got.tolist() == want


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("radius", [0.05, 0.6, 9.0])
@pytest.mark.parametrize("at_once", [1, 40, 1 << 21])
@pytest.mark.parametrize("tree_after", [0, 5, 1 << 21])
def test_ball_agrees_with_reference(k, radius, at_once, tree_after, monkeypatch):
    monkeypatch.setattr(grouping, "BALL_CHUNK", at_once)
    monkeypatch.setattr(grouping, "BALL_TREE_AFTER", tree_after)
    xyz, queries = cloud(25, 2, seed=1, grid=2.0), cloud(6, 2, seed=2)
    got = ball(xyz, queries, radius, k)
    want = [
        [reference.ball(p.tolist(), q.tolist(), radius, k) for q in qs]
        for p, qs in zip(xyz, queries)
    ]
    assert got.tolist() == want


def test_ball_fills_up_and_falls_back_to_the_nearest():
    line = torch.tensor([[[float(i), 0, 0] for i in range(6)]])
    assert ball(line, line[:, :1], 2.0, 5).tolist() == [[[0, 1, 2, 0, 0]]]
    assert ball(line, line[:, :1], 2.0, 5, strict=True).tolist() == [[[0, 1, 0, 0, 0]]]
    assert ball(line, line[:, 3:4], 2.5, 2).tolist() == [[[1, 2]]]
    far = torch.tensor([[[4.4, 9.0, 0]]])
    assert ball(line, far, 0.5, 2).tolist() == [[[4, 4]]]
    assert ball(line, far, 0.5, 2, strict=True).tolist() == [[[0, 0]]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 32, 64, 100, 511, 1024, 5000])
@pytest.mark.parametrize("radius", [None, 0.2])
@pytest.mark.parametrize("aware", [True, False])
def test_groups_from_one_point_up(n, radius, aware):
    rule = Grouping(24, 8, 1024, radius, density_aware=aware)
    n_groups, k = rule.sizes(n)
    assert 1 <= n_groups <= min(24, n) and 1 <= k <= min(8, n)
    xyz = cloud(n, 2)
    centers, members = rule(xyz)
    assert centers.shape == (2, n_groups) and members.shape == (2, n_groups, k)
    assert all(len(set(row)) == n_groups for row in centers.tolist())
    assert members.min() >= 0 and members.max() < n


def test_density_rule():
    ulip = Grouping(512, 32, 8192)
    assert ulip.sizes(8192) == (512, 32) == ulip.sizes(4096)
    assert ulip.sizes(64) == (43, 6)
    assert ulip.sizes(1) == (1, 1)
    sizes = [ulip.sizes(n) for n in range(1, 8192)]
    ks = [k for _, k in sizes]
    assert ks == sorted(ks)
    # On sparse clouds a point is in four groups on average, elsewhere in as many as were published.
    assert all(g * k >= 4 * n for n, (g, k) in enumerate(sizes, 1) if 8 <= n <= 1024)
    assert all(g * k >= 1.8 * n for n, (g, k) in enumerate(sizes, 1) if 8 <= n <= 8000)
    assert Grouping(512, 32, 8192, density_aware=False).sizes(64) == (64, 32)
    for dense in (Grouping(512, 64, 10_000), Grouping(384, 64, 10_000), Grouping(128, 16, 1024)):
        border = math.ceil(dense.n_dense / 2)
        (groups, k), (below, k_below) = dense.sizes(border), dense.sizes(border - 1)
        assert groups - below <= 1 and k - k_below <= 1  # no jump


def test_quirks_only_on_dense_clouds():
    xyz = cloud(64)
    xyz[0, 5:40] *= 0.01
    with_quirks = Grouping(40, 4, 64, pointnet2=True)
    assert len(set(with_quirks(xyz)[0][0].tolist())) < 40
    grid = torch.cartesian_prod(*[torch.arange(1, 5) / 4] * 3)[None]  # neighbours at the radius
    centers, members = Grouping(40, 4, 64, radius=0.25, pointnet2=True)(grid)
    strict, other = (ball(grid, gather(grid, centers), 0.25, 4, strict=x) for x in (True, False))
    assert torch.equal(members, strict) and not torch.equal(strict, other)
    sparse = Grouping(40, 4, 6400, pointnet2=True)(xyz)[0][0].tolist()
    assert len(set(sparse)) == len(sparse)


def test_gather():
    values = torch.arange(24.0).view(2, 4, 3)
    indices = torch.tensor([[[0, 3]], [[2, 2]]])
    got = gather(values, indices)
    assert got.shape == (2, 1, 2, 3)
    assert torch.equal(got[0, 0, 1], values[0, 3]) and torch.equal(got[1, 0, 0], values[1, 2])


@pytest.mark.parametrize("bad", [torch.zeros(4, 3), torch.zeros(1, 0, 3), torch.zeros(1, 4, 2)])
def test_wrong_shapes(bad):
    for call in (
        lambda: farthest_points(bad, 1),
        lambda: farthest_points_pointnet2(bad, 1),
        lambda: nearest(bad, bad, 1),
        lambda: ball(bad, bad, 1.0, 1),
        lambda: Grouping(4, 4, 64)(bad),
    ):
        with pytest.raises(ShapeError, match="expected"):
            call()


def test_refusals():
    xyz = cloud(4)
    with pytest.raises(ShapeError, match="floating-point"):
        farthest_points(xyz.long(), 1)
    for n_samples, start in ((0, 0), (5, 0), (1, 4)):
        with pytest.raises(ShapeError, match="out of range"):
            farthest_points(xyz, n_samples, start)
    for k in (0, 5):
        with pytest.raises(ShapeError, match="out of range"):
            nearest(xyz, xyz, k)
    with pytest.raises(ShapeError, match="1 or more"):
        farthest_points_pointnet2(xyz, 0)
    for wrong in ({"n_groups": 0}, {"k": 0}, {"n_dense": 0}, {"radius": -1.0}, {"k_min": 0}):
        with pytest.raises(InputError, match="must be"):
            Grouping(**{"n_groups": 4, "k": 4, "n_dense": 64, **wrong})
