"""Dynamic merging: a random mask on the merged weight, as whole rows of B and columns of A."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor


def axis_rate(p: float) -> float:
    """Share of rows, and of columns, to mask so that a share p of B·A is masked.

    Source: SLIM, fast dynamic merging: row = col = 1 − √(1−p).

    Args:
        p: share of the entries of B·A that are masked on average, in [0, 1).
    """
    return 1 - math.sqrt(1 - p)


def draw_keep(size: int, p: float, *, seed: int, key: str, step: int) -> Tensor:
    """Which rows, or columns, stay in one optimiser step.

    A function of its arguments alone: the same on every rank, when a forward pass is repeated by
    gradient checkpointing, and after training is resumed; no global random state is read.

    Args:
        size: number of rows or columns.
        p: share of the entries of B·A to mask, in [0, 1).
        seed: of the run.
        key: name of the layer and axis.
        step: optimiser steps made.

    Returns:
        bool, shape (size,), on the CPU; True stays.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}/{step}".encode()))
    return torch.rand(size, generator=generator) >= axis_rate(p)


def merged_scale(p: float, *, rescale: bool, masked: bool) -> float:
    """Factor on B·A that goes with a mask, or that stands in for one.

    Source: SLIM, dynamic merging, θ + M ⊗ (BA). Open: behaviour at inference, and whether M is
    divided by 1 − p as in DARE. Without a mask the factor is the expectation of M.

    Args:
        p: share masked.
        rescale: divide by 1 − p.
        masked: whether a mask is applied; if not, its expectation is.
    """
    scale = 1 / (1 - p) if rescale else 1.0
    return scale if masked else scale * (1 - p)
