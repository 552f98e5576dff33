"""`bench points-speed`: encoders with and without adapters, and groups against a loop."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from budwood.points.adapters import Adapter, make_adapter
from budwood.points.adapters.prompts import FusedCrossAttention
from budwood.points.encoders import PointEncoder
from budwood.points.grouping import Grouping
from budwood.timing import median_ratio, seconds, side_by_side

Row = dict[str, Any]


def encoder_rows(encoder: PointEncoder, n_points: int, batch: int, repeats: int) -> list[Row]:
    """Time encoding with fused cross-attention, before and after ``fuse()``, and with LoRA.

    Adapters are untrained, since speed does not depend on training. Ratios are taken within a round
    and their medians reported.

    Args:
        encoder: frozen.
        n_points: of each cloud.
        batch: clouds at once.
        repeats: rounds, after one warm-up; each runs everything once.

    Returns:
        Rows with ``what, points, clouds_per_s, over_frozen``.
    """
    xyz = torch.randn(batch, n_points, 3, generator=torch.Generator().manual_seed(0))
    xyz = xyz / xyz.norm(dim=-1).amax(dim=1)[:, None, None]
    runs: dict[str, PointEncoder | Adapter] = {"frozen": encoder}
    for init in ("random", "closed"):
        adapter = make_adapter("fca", encoder, init=init)
        assert isinstance(adapter, FusedCrossAttention)
        runs |= {f"fca {init}": adapter, f"fca {init}, fused": adapter.fuse().eval()}
    runs["lora"] = make_adapter("lora", encoder)
    with torch.inference_mode():
        clocks = {name: clock(functools.partial(run, xyz)) for name, run in runs.items()}
        times = side_by_side(clocks, repeats)
    ratio = {name: median_ratio(elapsed, times["frozen"]) for name, elapsed in times.items()}
    return rate_rows(times, n_points, batch, over_frozen=ratio)


def grouping_rows(grouping: Grouping, n_points: int, batch: int, repeats: int) -> list[Row]:
    """Time grouping with tensors, and with a loop over clouds and centres in NumPy.

    Returns:
        Rows with ``what, points, clouds_per_s, over_loop`` (speed divided by the loop's).
    """
    xyz = torch.randn(batch, n_points, 3, generator=torch.Generator().manual_seed(0))
    n_groups, k = grouping.sizes(n_points)
    by_distance = dataclasses.replace(grouping, radius=None, pointnet2=False)
    runs = {
        "groups": lambda: by_distance(xyz),
        "groups, loop": lambda: [looped_groups(cloud.numpy(), n_groups, k) for cloud in xyz],
    }
    times = side_by_side({name: clock(run) for name, run in runs.items()}, repeats)
    ratio = {name: median_ratio(times["groups, loop"], mine) for name, mine in times.items()}
    return rate_rows(times, n_points, batch, over_loop=ratio)


def rate_rows(
    times: Mapping[str, Sequence[float]],
    n_points: int,
    n_clouds: int,
    **ratios: Mapping[str, float],
) -> list[Row]:
    """Rows with ``what, points, clouds_per_s`` and the ratios.

    Args:
        times: what was run → seconds of each round.
        n_points: of each cloud.
        n_clouds: of a round.
        ratios: name → what was run → value.
    """
    return [
        {
            "what": name,
            "points": n_points,
            "clouds_per_s": n_clouds / statistics.median(elapsed),
            **{key: values[name] for key, values in ratios.items()},
        }
        for name, elapsed in times.items()
    ]


def looped_groups(xyz: np.ndarray, n_groups: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Group one cloud the simple way: centre by centre. The groups equal :class:`Grouping`'s.

    Args:
        xyz: one cloud, shape (n_points, 3).
        n_groups: centres.
        k: members of each group.

    Returns:
        Indices of centres, shape (n_groups,), and of members, shape (n_groups, k).
    """
    centers, gaps = [0], np.full(len(xyz), np.inf)
    while len(centers) < n_groups:
        gaps = np.minimum(gaps, np.square(xyz - xyz[centers[-1]]).sum(axis=1))
        gaps[centers[-1]] = -1
        centers.append(int(gaps.argmax()))
    members = []
    for center in centers:
        distance = np.square(xyz - xyz[center]).sum(axis=1)
        members.append(np.argsort(distance, kind="stable")[:k])
    return np.array(centers), np.stack(members)


def clock(run: Callable[[], Any]) -> Callable[[int], float]:
    """A run whose time is taken, for :func:`budwood.timing.side_by_side`."""
    return lambda _: seconds(run)
