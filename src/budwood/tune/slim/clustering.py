"""Running statistics of the training data: sums of one step, and how statistics move by them.

Source: SLIM, sliding clustering. A layer's statistics are cluster centres, a spread around them,
and the distribution of the distances. Each optimiser step adds up :class:`Moments` of its
tokens, over passes and ranks, and the functions here move the statistics by them. Everything is
pure, float32 and outside autograd. :mod:`budwood.tune.slim.distance` measures with these
statistics, :mod:`budwood.tune.slim.state` holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6
"""Least variance of a channel, as a fraction of the mean variance."""
SPREAD = 0.1
"""Distance of the first centres from the mean, in standard deviations per channel."""
FEW = 8
"""Number of tokens from which the variances of the first step are used as they are."""


@dataclass(frozen=True)
class Moments:
    """What tokens add to the statistics; all are sums, so that parts of a batch add up.

    Attributes:
        count: tokens nearest to each centre, shape (n_clusters,).
        first: sum of x − c over them, shape (n_clusters, d).
        second: sum of (x − c)² over them, shape (n_clusters, d). In a whitened subspace: sum of
            (x − c)·(x − c)ᵀ over all tokens, shape (n_directions, n_directions).
        distance: number, sum and sum of squares of the raw distances, shape (3,).
    """

    count: Tensor
    first: Tensor
    second: Tensor
    distance: Tensor

    @classmethod
    def zeros(cls, first: Tensor, second: Tensor) -> Moments:
        """Make moments of no tokens, with the shapes and device of ``first`` and ``second``."""
        return cls(
            first.new_zeros(len(first)),
            torch.zeros_like(first),
            torch.zeros_like(second),
            first.new_zeros(3),
        )

    @staticmethod
    def n_values(first: Sequence[int], second: Sequence[int]) -> int:
        """Count the values of moments by the shapes of ``first`` and ``second``."""
        return first[0] + math.prod(first) + math.prod(second) + 3

    def flat(self) -> Tensor:
        """Join everything to one vector."""
        return torch.cat([self.count, self.first.flatten(), self.second.flatten(), self.distance])

    def filled(self, flat: Tensor) -> Moments:
        """Make moments of these shapes from a vector: the inverse of :meth:`flat`."""
        shapes = (self.count, self.first, self.second, self.distance)
        parts = flat.split([like.numel() for like in shapes])
        return Moments(*(part.view_as(like) for part, like in zip(parts, shapes)))

    def add(
        self,
        nearest: Tensor,
        diff: Tensor,
        raw: Tensor,
        keep: Tensor | None,
        *,
        pooled: bool = False,
    ) -> None:
        """Add some tokens, in place.

        Args:
            nearest: centre of each token, shape (n_tokens,).
            diff: x − c, shape (n_tokens, d).
            raw: distances, shape (n_tokens,).
            keep: tokens that count, bool, shape (n_tokens,); None for all.
            pooled: ``second`` is one matrix of products, instead of squares per centre.
        """
        members = diff.new_zeros(len(self.count), len(nearest))
        weight = raw.new_ones(len(raw)) if keep is None else keep.float()
        members.scatter_(0, nearest.unsqueeze(0), weight.unsqueeze(0))
        if keep is not None:  # 0 · inf would be NaN: padding may hold anything
            diff = diff.masked_fill(~keep.unsqueeze(-1), 0)
            raw = raw.masked_fill(~keep, 0)
        self.count.add_(members.sum(-1))
        self.first.addmm_(members, diff)
        if pooled:
            self.second.addmm_(diff.T, diff)
        else:
            self.second.addmm_(members, diff.square())
        self.distance.add_(torch.stack([weight.sum(), raw.sum(), raw.square().sum()]))


def channel_scale(var: Tensor) -> Tensor:
    """Compute 1/σ with a floor under σ, in the shape of ``var``, (…, d)."""
    return (var + FLOOR * var.mean(-1, keepdim=True) + 1e-12).rsqrt()


def seed_centres(moments: Moments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make the first centres and variances from the moments of the first step around zero.

    Open: how the paper starts. Ours is deterministic and exchanges no tokens between ranks. Centres
    are the mean of all tokens, moved a little along a random direction each; a single centre is the
    mean. Below ``FEW`` tokens, variances lean on the mean square of all channels, since the
    variance of one token is 0 everywhere.

    Args:
        moments: of the first step, around centres at zero.
        generator: draws the directions, on the CPU.

    Returns:
        Centres and variances, float32, each of shape (n_clusters, d_in).
    """
    n = moments.count.sum().clamp(min=1)
    mean = moments.first.sum(0) / n
    square = moments.second.sum(0) / n
    var = (square - mean.square()).clamp(min=0)
    unsure = (1 - n / FEW).clamp(min=0)
    var = (1 - unsure) * var + unsure * square.mean()
    centre = mean + var.sqrt() * scatter(moments.first, generator)
    return centre, var.expand_as(centre).clone()


def scatter(centre: Tensor, generator: torch.Generator) -> Tensor:
    """Draw small offsets for centres in a space of unit variances; 0 for a single centre.

    Args:
        centre: shape (n_clusters, d); only its shape and device matter.
        generator: on the CPU.
    """
    if len(centre) == 1:
        return torch.zeros_like(centre)
    return SPREAD * torch.randn(centre.shape, generator=generator).to(centre.device)


def slide(centre: Tensor, var: Tensor, moments: Moments, momentum: float) -> tuple[Tensor, Tensor]:
    """Move centres and variances by one optimiser step.

    Source: SLIM, sliding clustering. Open: the weights. Ours: a centre with an average fraction of
    the tokens moves by ``momentum``, one with fewer by less, m = 1 − (1 − momentum)^(fraction ·
    n_clusters). The new variance is that of the old tokens at weight 1 − m and the new ones at m.

    Args:
        centre: shape (n_clusters, d_in).
        var: shape (n_clusters, d_in).
        moments: of the step, around ``centre``.
        momentum: in (0, 1].

    Returns:
        New centres and variances; a centre without tokens stays.
    """
    m, shift = _moves(moments, momentum)
    count = moments.count.unsqueeze(-1).clamp(min=1)
    spread = (moments.second / count - shift.square()).clamp(min=0)
    new_var = (1 - m) * var + m * spread + m * (1 - m) * shift.square()
    return centre + m * shift, new_var


def slide_whitened(
    centre: Tensor, covariance: Tensor, moments: Moments, momentum: float
) -> tuple[Tensor, Tensor]:
    """Move centres in a subspace, and the covariance around them, by one optimiser step.

    Ours. Centres move as in :func:`slide`. All centres share one covariance, which moves by
    ``momentum``: one for each would need more tokens than a run has.

    Args:
        centre: shape (n_clusters, n_directions).
        covariance: shape (n_directions, n_directions).
        moments: of the step, around ``centre``, with pooled products.
        momentum: in (0, 1].

    Returns:
        New centres and covariance; unchanged if the step had no token.
    """
    m, shift = _moves(moments, momentum)
    n = moments.count.sum()
    rate = momentum * (n > 0)
    return centre + m * shift, (1 - rate) * covariance + rate * moments.second / n.clamp(min=1)


def slide_distance(
    mean: Tensor, var: Tensor, moments: Moments, momentum: float
) -> tuple[Tensor, Tensor]:
    """Move the mean and variance of the raw distances by one step; momentum 1 starts them.

    Args:
        mean: shape ().
        var: shape ().
        moments: of the step.
        momentum: in (0, 1].

    Returns:
        New mean and variance; unchanged if the step had no token.
    """
    count, total, squares = moments.distance.unbind()
    m = momentum * (count > 0)
    step_mean = total / count.clamp(min=1)
    step_var = (squares / count.clamp(min=1) - step_mean.square()).clamp(min=0)
    shift = step_mean - mean
    return mean + m * shift, (1 - m) * var + m * step_var + m * (1 - m) * shift.square()


def _moves(moments: Moments, momentum: float) -> tuple[Tensor, Tensor]:
    """Weight of the step for each centre, shape (n_clusters, 1), and shifts (n_clusters, d)."""
    count = moments.count.unsqueeze(-1)
    fraction = count / count.sum().clamp(min=1)
    return 1 - (1 - momentum) ** (fraction * len(count)), moments.first / count.clamp(min=1)
