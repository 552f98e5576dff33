"""Frames joined by their poses."""

from __future__ import annotations

import numpy as np
import pytest

from budwood.errors import InputError
from budwood.points import accumulate
from budwood.points.io import make_cloud
from tests.points import layouts


def poses(n, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for angle in rng.uniform(0, 6, n):
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pose[:3, 3] = rng.normal(scale=30, size=3)
        made.append(pose)
    return np.stack(made)


@pytest.mark.parametrize("rows", [3, 4])
def test_frames_come_together(rows):
    car = layouts.car(600, at=(0, 0, 0)).astype(np.float64)
    rgb = np.abs(car) / np.abs(car).max()
    to_world, frames = poses(6), []
    for part, color, pose in zip(np.split(car, 6), np.split(rgb, 6), to_world, strict=True):
        seen = (part - pose[:3, 3]) @ pose[:3, :3]  # in the axes of the sensor
        frames.append(make_cloud(seen, color).assuming(up="z", dropped={"stray": 1}))
    dense = accumulate(frames, to_world[:, :rows], "car 1")
    np.testing.assert_allclose(dense.xyz, car, atol=1e-9)
    np.testing.assert_allclose(dense.rgb, rgb, atol=1e-6)
    assert (dense.source, dense.assumed.up, dense.assumed.dropped) == ("car 1", "z", {"stray": 6})
    assert accumulate([*frames[:5], make_cloud(car).assuming(up="z")], to_world).rgb is None


def test_poses_that_do_not_match():
    frames = [make_cloud(layouts.car(9))] * 2
    mirrored, nan = poses(2), poses(2)
    mirrored[1, :3, :3] *= -1
    nan[0, 0, 3] = np.nan
    for given, reason in [
        (poses(3), "3 poses for 2 frames"),
        (poses(2)[:, :2], r"shape \(2, 2, 4\)"),
        (mirrored, "pose 2 is no rotation"),
        (nan, "pose 1 is no rotation"),
        ("poses", "not numbers"),
    ]:
        with pytest.raises(InputError, match=reason):
            accumulate(frames, given)
    with pytest.raises(InputError, match="at least one frame"):
        accumulate([], np.zeros((0, 4, 4)))
    with pytest.raises(InputError, match="different axes up"):
        accumulate([frames[0], frames[1].assuming(up="z")], poses(2))
