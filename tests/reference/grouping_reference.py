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
