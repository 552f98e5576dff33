"""Timing several things side by side, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def side_by_side(
    runs: Mapping[str, Callable[[int], T]], repeats: int, warm_up: bool = True
) -> dict[str, list[T]]:
    """Call every function once a round: A B C, B C A, C A B, ….

    Args:
        runs: functions of the round's number.
        repeats: rounds that count.
        warm_up: run one round first whose results are dropped.

    Returns:
        The results of each function, one per round.
    """
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    if warm_up:
        for name in names:
            runs[name](0)
    for round_ in range(repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(runs[name](round_))
    return results


def seconds(run: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Time one call, waiting for the GPU where there is one."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str | torch.device) -> None:
    """Wait for a CUDA device; do nothing on other devices."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of ``times / baseline``.

    Args:
        times: one value per round.
        baseline: of the same rounds.
    """
    return statistics.median(own / other for own, other in zip(times, baseline))
