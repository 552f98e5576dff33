"""Files as sensors, data sets and tools lay them out, with the points of one object."""

from __future__ import annotations

import numpy as np


def car(n_points=600, seed=0, at=(12.0, 4.0, -0.9)):
    """Points on a box as large as a car, z up, away from the sensor; float32, shape (n, 3)."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.5, 0.5, size=(n_points, 3))
    side = rng.integers(3, size=n_points)
    points[np.arange(n_points), side] = np.sign(points[np.arange(n_points), side]) * 0.5
    return (points * (4.2, 1.8, 1.5) + at).astype(np.float32)


def frame(n_points=3000, seed=0):
    """A scan of a street: far points, and the ground 1.7 m below the sensor."""
    rng = np.random.default_rng(seed)
    radius, angle = rng.gamma(2, 10, n_points), rng.uniform(0, 2 * np.pi, n_points)
    height = np.where(rng.random(n_points) < 0.6, -1.7, rng.uniform(-1.7, 2.5, n_points))
    xyz = np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)
    return (xyz + rng.normal(scale=0.02, size=xyz.shape)).astype(np.float32)


def kitti(xyz, seed=0):
    """x, y, z, reflectance in hundredths."""
    rng = np.random.default_rng(seed)
    return np.hstack([xyz, rng.integers(0, 100, (len(xyz), 1)) / 100]).astype("<f4")


def nuscenes(xyz, seed=0):
    """x, y, z, intensity up to 255, and the ring, which goes round."""
    rng = np.random.default_rng(seed)
    ring = np.arange(len(xyz))[:, None] % 32
    return np.hstack([xyz, rng.integers(0, 256, (len(xyz), 1)), ring]).astype("<f4")


def s3dis(xyz, seed=0):
    """x, y, z from 0 up, and red, green, blue up to 255."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, 230, (len(xyz), 1))
    rgb = grey + rng.integers(0, 25, (len(xyz), 3))
    return np.hstack([xyz - xyz.min(axis=0), rgb]).astype("<f4")


def sun_rgbd(xyz, seed=0):
    """x, y, z, and colours in 0…1."""
    table = s3dis(xyz, seed)
    table[:, 3:] /= 255
    return table


def waymo(xyz, seed=0):
    """x, y, z, intensity without a bound, elongation, and a time that is always 0."""
    rng = np.random.default_rng(seed)
    intensity, elongation = rng.gamma(0.5, 3, len(xyz)), rng.uniform(0, 1.5, len(xyz))
    return np.stack([*xyz.T, intensity, elongation, np.zeros(len(xyz))], axis=1).astype("<f4")


def radar(xyz, seed=0):
    """x, y, z, cross-section in decibels, two velocities, and the number of the sweep."""
    rng = np.random.default_rng(seed)
    rcs, speed = rng.normal(-5, 8, len(xyz)), rng.normal(0, 3, (2, len(xyz)))
    return np.stack([*xyz.T, rcs, *speed, rng.integers(-4, 1, len(xyz))], axis=1).astype("<f4")


def bare(xyz, seed=0):
    """Nothing but x, y, z."""
    return xyz.astype("<f4")


BINS = {
    "bare": (bare, "xyz"),
    "kitti": (kitti, "xyz_"),
    "nuscenes": (nuscenes, "xyz__"),
    "s3dis": (s3dis, "xyzrgb"),
    "sun_rgbd": (sun_rgbd, "xyzrgb"),
    "waymo": (waymo, "xyz___"),
    "radar": (radar, "xyz____"),
}
