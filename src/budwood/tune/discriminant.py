"""Distance along one direction: from the training data towards text that must not change.

Ours, a deviation from SLIM, whose distance knows the training data alone. Where both are known, and
share a covariance, the squared Mahalanobis distance to the one minus that to the other is linear in
the token: Fisher's linear discriminant. One product a token measures it, in all channels. Pure
tensor functions, float32 and outside autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from budwood.tune.clustering import Moments, channel_scale, over_blocks

RIDGE = 0.1
"""Added to variances that are about 1: there are fewer tokens than a full covariance needs."""


def discriminant(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant between two samples, with a ridge.

    Source: Friedman 1989, regularised discriminant analysis. w = (C + λ)⁻¹·(μ_other − μ_own) in
    standardised channels, C the mean of the two covariances; the relative Mahalanobis distance
    (arXiv 2106.09022) with one covariance for both.

    Args:
        own: tokens of the training data, float32, shape (n_own, d_in).
        other: tokens of other text, float32, shape (n_other, d_in).

    Returns:
        w in the channels as they are, shape (d_in,), and the offset o, shape (), with which
        x·w − o is below 0 on the side of ``own``.
    """
    both = torch.cat([own, other])
    mean, scale = both.mean(0), channel_scale(both.var(0, correction=0))
    own, other = (own - mean) * scale, (other - mean) * scale
    centres = own.mean(0), other.mean(0)
    spread = torch.cat(
        [(x - c) * (2 * len(x)) ** -0.5 for x, c in zip((own, other), centres)]
    )  # the mean covariance is its product with itself
    direction = _solve(spread, centres[1] - centres[0]) * scale
    middle = mean + (centres[0] + centres[1]) / 2 / scale
    return direction, middle @ direction


def measure_along(
    x: Tensor,
    direction: Tensor,
    offset: Tensor,
    *,
    gather: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """How far along a direction each token lies: x·w − o. To be called outside autocast.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        direction: w, shape (d_in,).
        offset: o, shape ().
        gather: also return moments; there are no centres, so they are those of the distance.
        keep: bool, shape (n_tokens,): tokens that enter the moments; None for all.

    Returns:
        Raw distances, float32, shape (n_tokens,), and the moments or None.
    """

    def of_block(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest = torch.zeros(len(part), dtype=torch.long, device=part.device)
        return nearest, part[:, :0], part @ direction - offset

    sums = no_centres(direction) if gather else None
    return over_blocks(x, of_block, sums, keep), sums


def no_centres(like: Tensor) -> Moments:
    """Moments of no tokens, of the distance alone; on the device of ``like``."""
    nothing = like.new_zeros(1, 0)
    return Moments.zeros(nothing, nothing)


def _solve(spread: Tensor, gap: Tensor) -> Tensor:
    """(SᵀS + λ)⁻¹·g for S of shape (n, d), through the smaller of the two sides."""
    n, d = spread.shape
    if d <= n:
        return torch.linalg.solve(spread.T @ spread + RIDGE * torch.eye(d).to(gap), gap)
    inner = torch.linalg.solve(spread @ spread.T + RIDGE * torch.eye(n).to(gap), spread @ gap)
    return (gap - spread.T @ inner) / RIDGE
