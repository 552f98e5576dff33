"""Sliding clustering: where the training data lie, as centres and variances that move along.

Pure tensor functions for the distances over channels; those in a whitened subspace are in
``whitening``. Everything is float32 and outside autograd: the distance steers the router but sends
no gradient back (an open reading of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD = 0.1
"""Centres start this far from the mean, in standard deviations a channel."""
FLOOR = 1e-6
"""Least variance of a channel, as a share of the centre's mean variance."""
FEW = 8
"""Tokens from which on the variances of the first step are taken as they are."""


@dataclass(frozen=True)
class Moments:
    """What one forward pass adds to the statistics; sums, so that parts of a batch add up.

    Attributes:
        count: tokens nearest to each centre, shape (n_clusters,).
        first: sum of x − c over them, shape (n_clusters, d_in).
        second: sum of (x − c)² over them, shape (n_clusters, d_in); in a whitened subspace that
            of (x − c)·(x − c)ᵀ over all, shape (n_directions, n_directions).
        distance: number, sum and sum of squares of the raw distances, shape (3,).
    """

    count: Tensor
    first: Tensor
    second: Tensor
    distance: Tensor

    def flat(self) -> Tensor:
        """All of it as one vector."""
        return torch.cat([self.count, self.first.flatten(), self.second.flatten(), self.distance])

    @classmethod
    def zeros(cls, first: Tensor, second: Tensor) -> Moments:
        """Of no tokens, for centres and a spread of these shapes."""
        return cls(
            first.new_zeros(len(first)),
            torch.zeros_like(first),
            torch.zeros_like(second),
            first.new_zeros(3),
        )

    def filled(self, flat: Tensor) -> Moments:
        """Moments of these shapes from one vector: the inverse of :meth:`flat`."""
        own = (self.count, self.first, self.second, self.distance)
        parts = flat.split([part.numel() for part in own])
        return Moments(*(part.view_as(one) for part, one in zip(parts, own)))

    def add(
        self,
        nearest: Tensor,
        diff: Tensor,
        raw: Tensor,
        keep: Tensor | None,
        *,
        pooled: bool = False,
    ) -> None:
        """Take up some tokens.

        Args:
            nearest: centre of each, shape (n_tokens,).
            diff: x − c, shape (n_tokens, d_in).
            raw: distances, shape (n_tokens,).
            keep: bool, shape (n_tokens,): those that count; None for all.
            pooled: ``second`` is one matrix of products, in place of squares for each centre.
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
    """1/σ per centre and channel, with a floor under σ, shape and type of ``var``."""
    return (var + FLOOR * var.mean(-1, keepdim=True) + 1e-12).rsqrt()


def measure(
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    kind: str,
    *,
    gather: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """Distance of each token to its nearest centre, and what the tokens add to the statistics.

    Source: SLIM, weight yielding: d = max over channels of |x − c| / σ, minus 1. ``"rms"`` (ours)
    takes the root of the mean square over channels in place of the maximum. Nearest is meant in
    the Euclidean sense (an open reading). Works through the tokens in blocks, so that no copy of x
    is ever held. To be called outside autocast.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        centre: float32, shape (n_clusters, d_in).
        scale: 1/σ, float32, shape (n_clusters, d_in).
        kind: ``"max"`` or ``"rms"``.
        gather: also return moments.
        keep: bool, shape (n_tokens,): tokens that enter the moments; None for all.

    Returns:
        Raw distances, float32, shape (n_tokens,), and the moments or None.
    """

    def of_block(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest, diff = from_nearest(part, centre)
        scaled = diff * (scale[nearest] if len(centre) > 1 else scale)
        if kind == "max":
            found = torch.linalg.vector_norm(scaled, ord=math.inf, dim=-1)
        else:
            found = torch.linalg.vector_norm(scaled, dim=-1) / math.sqrt(centre.shape[1])
        return nearest, diff, found - 1

    sums = Moments.zeros(centre, centre) if gather else None
    return over_blocks(x, of_block, sums, keep), sums


def over_blocks(
    x: Tensor,
    of_block: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    sums: Moments | None,
    keep: Tensor | None,
    *,
    pooled: bool = False,
) -> Tensor:
    """Raw distances of tokens, float32, shape (n_tokens,), some tokens at a time.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        of_block: from some tokens as float32 to nearest centres, x − c and distances.
        sums: moments that the tokens are added to; None for none.
        keep: as of :func:`measure`.
        pooled: as of :meth:`Moments.add`.
    """
    raw = torch.empty(len(x), device=x.device, dtype=torch.float32)
    block = block_size(x)
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        nearest, diff, found = of_block(x[part].float())
        raw[part] = found
        if sums is not None:
            sums.add(nearest, diff, found, None if keep is None else keep[part], pooled=pooled)
    return raw


def from_nearest(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each token, shape (n_tokens,), and x − c, shape (n_tokens, d)."""
    if len(centre) == 1:
        return torch.zeros(len(x), dtype=torch.long, device=x.device), x - centre
    # argmin of |x − c|² is argmin of |c|²/2 − x·c
    offset = centre.square().sum(-1) / 2
    nearest = torch.addmm(offset, x, centre.T, alpha=-1).argmin(-1)
    return nearest, x - centre[nearest]


def block_size(x: Tensor) -> int:
    """Tokens a block: what stays in a core's cache on a CPU, and few launches elsewhere."""
    values = 2**18 if x.device.type == "cpu" else 2**26
    return max(1, values // max(x.shape[-1], 1))


def seed_centres(moments: Moments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First centres and variances, from the moments of the first step around zero.

    Open: the paper's start. Ours is deterministic and needs no exchange of tokens between ranks:
    the mean of all tokens, moved a little along a random direction for each centre, which splits
    the tokens by projection; a single centre is the mean itself. The variance of a few tokens says
    little, that of one is 0 in all channels: below ``FEW`` the rest of the weight is on the mean
    square of all channels.

    Args:
        moments: of the first step, taken around centres at zero.
        generator: on the CPU; of the directions.

    Returns:
        centre and var, float32, each of shape (n_clusters, d_in).
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
    """Small random places to start centres from, in a space of unit variances; 0 for a single one.

    Args:
        centre: shape (n_clusters, d); only its shape and device matter.
        generator: on the CPU.
    """
    if len(centre) == 1:
        return torch.zeros_like(centre)
    return SPREAD * torch.randn(centre.shape, generator=generator).to(centre.device)


def slide(centre: Tensor, var: Tensor, moments: Moments, momentum: float) -> tuple[Tensor, Tensor]:
    """Centres and variances after one optimiser step.

    Source: SLIM, sliding clustering. Open reading: a centre with an average share of the tokens
    moves by ``momentum``, one with fewer by less: m = 1 − (1 − momentum)^(share · n_clusters). The
    new variance is that of the old tokens at weight 1 − m and the new ones at weight m.

    Args:
        centre: shape (n_clusters, d_in).
        var: of the same shape.
        moments: around ``centre``.
        momentum: in (0, 1].

    Returns:
        New centre and var; unchanged where a centre got no token.
    """
    m, shift = moves(moments, momentum)
    count = moments.count.unsqueeze(-1).clamp(min=1)
    spread = (moments.second / count - shift.square()).clamp(min=0)
    new_var = (1 - m) * var + m * spread + m * (1 - m) * shift.square()
    return centre + m * shift, new_var


def moves(moments: Moments, momentum: float) -> tuple[Tensor, Tensor]:
    """How far each centre moves, as shares of shape (n_clusters, 1) of shifts (n_clusters, d)."""
    count = moments.count.unsqueeze(-1)
    share = count / count.sum().clamp(min=1)
    return 1 - (1 - momentum) ** (share * len(count)), moments.first / count.clamp(min=1)


def slide_distance(
    mean: Tensor, var: Tensor, moments: Moments, momentum: float
) -> tuple[Tensor, Tensor]:
    """Running mean and variance of the raw distance after one step; momentum 1 starts them.

    Args:
        mean: shape ().
        var: shape ().
        moments: of the step.
        momentum: in (0, 1].

    Returns:
        New mean and var; unchanged if the step had no token.
    """
    count, total, squares = moments.distance.unbind()
    m = momentum * (count > 0)
    own = total / count.clamp(min=1)
    own_var = (squares / count.clamp(min=1) - own.square()).clamp(min=0)
    shift = own - mean
    return mean + m * shift, (1 - m) * var + m * own_var + m * (1 - m) * shift.square()
