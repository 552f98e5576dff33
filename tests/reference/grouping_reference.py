"""Sampling and grouping in loops, written from the descriptions; slow on purpose.

Points are lists of three floats. `pointnet2_farthest` plays the threads of the GPU kernel one by
one, in float32 and in its order; the package must agree with it exactly, not only closely.
"""

from __future__ import annotations

import math

import numpy as np

F32 = np.float32


def farthest(points, n_samples, start=0):
    chosen = [start]
    while len(chosen) < n_samples:
        best, best_gap = None, -1.0
        for i, p in enumerate(points):
            if i in chosen:
                continue
            gap = min(math.dist(p, points[j]) for j in chosen)
            if gap > best_gap:
                best, best_gap = i, gap
        chosen.append(best)
    return chosen


def pointnet2_farthest(points, n_samples):
    points = np.asarray(points, dtype=F32)
    n = len(points)
    n_threads = 1
    while n_threads * 2 <= min(n, 512):
        n_threads *= 2
    nearest = [F32(1e10)] * n
    chosen = [0]
    for _ in range(1, n_samples):
        old = points[chosen[-1]]
        best = [F32(-1)] * n_threads
        best_i = [0] * n_threads
        for thread in range(n_threads):
            for k in range(thread, n, n_threads):
                x, y, z = points[k]
                if F32(F32(x * x + y * y) + z * z) <= F32(1e-3):
                    continue
                dx, dy, dz = points[k] - old
                d = F32(F32(dx * dx + dy * dy) + dz * dz)
                nearest[k] = min(d, nearest[k])
                if nearest[k] > best[thread]:
                    best[thread], best_i[thread] = nearest[k], k
        half = n_threads // 2
        while half:
            for thread in range(half):
                if best[thread + half] > best[thread]:
                    best[thread], best_i[thread] = best[thread + half], best_i[thread + half]
            half //= 2
        chosen.append(best_i[0])
    return chosen


def nearest(points, query, k):
    return sorted(range(len(points)), key=lambda i: math.dist(points[i], query))[:k]


def pointnet2_ball(points, query, radius, k):
    found = [0] * k
    count = 0
    limit = F32(F32(radius) * F32(radius))
    for i, p in enumerate(np.asarray(points, dtype=F32)):
        dx, dy, dz = np.asarray(query, dtype=F32) - p
        if F32(F32(dx * dx + dy * dy) + dz * dz) < limit:
            if count == 0:
                found = [i] * k
            found[count] = i
            count += 1
            if count == k:
                break
    return found


def ball(points, query, radius, k):
    """The first k by index, filled up with the first; the nearest where there is none."""
    points = np.asarray(points, dtype=F32)
    gaps = []
    for p in points:
        dx, dy, dz = np.asarray(query, dtype=F32) - p
        gaps.append(F32(F32(dx * dx + dy * dy) + dz * dz))
    limit = F32(F32(radius) * F32(radius))
    found = [i for i, gap in enumerate(gaps) if gap <= limit][:k] or [int(np.argmin(gaps))]
    return found + found[:1] * (k - len(found))


def first_returns(points, offset, beam, azimuth):
    """The nearest point in each cell of beam (radians) and azimuth (degrees), by index."""
    nearest = {}
    for i, p in enumerate(np.asarray(points) + offset):
        distance = float(np.linalg.norm(p))
        row = math.floor(float(np.arcsin(np.clip(p[2] / max(distance, 1e-9), -1, 1))) / beam)
        column = math.floor(float(np.degrees(np.arctan2(p[1], p[0]))) / azimuth)
        if (row, column) not in nearest or distance < nearest[row, column][0]:
            nearest[row, column] = distance, i
    return sorted(i for _, i in nearest.values())


def lidar(points, n_points, heading, beam, azimuth):
    """The distance is halved 24 times on a logarithmic scale, so that returns are few enough."""
    points = np.asarray(points)
    points = points - points.mean(axis=0)
    points = points * (1.5 / np.ptp(points, axis=0).max())
    low, high = 2.0, 2000.0
    seen = first_returns(points, heading * low, beam, azimuth)
    for _ in range(24):
        middle = math.sqrt(low * high)
        trial = first_returns(points, heading * middle, beam, azimuth)
        if len(trial) > n_points:
            low = middle
        else:
            seen, high = trial, middle
    return seen
