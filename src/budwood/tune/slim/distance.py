"""Distances: how far a token is from the training data.

Three ways, each with the statistics that it needs:

- :func:`measure`: per channel, from the nearest cluster centre; ``"max"`` (the paper's) or
  ``"rms"``.
- :func:`measure_whitened`: from the nearest centre in a random subspace, correlations included.
  Ours. What tells other text from training data lies in directions in which training data hardly
  vary, and these combine many channels. A full covariance would be as large as the layer; a few
  random directions with a small covariance approximate it.
- :func:`measure_along`: along one direction, from training data to other text. Ours, and the one
  that forgets least. It needs other text, where the first two know the training data alone.

All return raw distances; :func:`budwood.tune.equations.standardised_distance` puts them on one
scale. Functions are pure, float32 and outside autograd: the distance steers the router and sends no
gradient back (open in the paper). Call them outside autocast.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from budwood.tune.slim.clustering import Moments, channel_scale

RIDGE = 1e-3
"""Added to the variances, about 1, of a covariance that is inverted."""
LEAST_RIDGE = 1e-5
"""The same as a fraction of the largest variance: the precision of float32."""
BEGINS = 0.02
"""Fraction of other text that may lie nearer than where it is said to begin."""
DISCRIMINANT_RIDGE = 0.1
"""Added to variances of about 1: a full covariance would need more tokens than there are."""

# --- Per channel: the paper's -----------------------------------------------------------------


def measure(
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    kind: str,
    *,
    gather: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """Measure each token's distance from its nearest centre, channel by channel.

    Source: SLIM, weight yielding: max over channels of |x − c| / σ, minus 1. ``"rms"`` (ours) takes
    the root mean square over channels instead. Open: what nearest means; ours is Euclidean.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        centre: c, float32, shape (n_clusters, d_in).
        scale: 1/σ, float32, shape (n_clusters, d_in).
        kind: ``"max"`` or ``"rms"``.
        gather: also return moments.
        keep: tokens that enter the moments, bool, shape (n_tokens,); None for all.

    Returns:
        Raw distances, float32, shape (n_tokens,), and the moments or None.
    """

    def of_block(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest, diff = _from_nearest(part, centre)
        scaled = diff * (scale[nearest] if len(centre) > 1 else scale)
        if kind == "max":
            far = torch.linalg.vector_norm(scaled, ord=math.inf, dim=-1)
        else:
            far = torch.linalg.vector_norm(scaled, dim=-1) / math.sqrt(centre.shape[1])
        return nearest, diff, far - 1

    sums = Moments.zeros(centre, centre) if gather else None
    return _over_blocks(x, of_block, sums, keep), sums


# --- Whitened: with correlations between channels ---------------------------------------------


def random_directions(d_in: int, n_directions: int, *, seed: int, key: str) -> Tensor:
    """Draw random signs over √d_in: inputs of unit variance give outputs of unit variance.

    The result depends on the arguments alone and is never saved; NumPy guarantees the stream of
    this generator.

    Args:
        d_in: channels.
        n_directions: columns.
        seed: of the adapter.
        key: name of the layer.

    Returns:
        float32, shape (d_in, n_directions), on the CPU.
    """
    stream = np.random.RandomState(zlib.crc32(f"{seed}/{key}/directions".encode()))
    signs = stream.randint(0, 2, size=(d_in, n_directions), dtype=np.int8)
    return (torch.from_numpy(signs).float() * 2 - 1) / math.sqrt(d_in)


def whitener(covariance: Tensor) -> Tensor:
    """Compute W such that rows with this covariance, times W, are white.

    Args:
        covariance: float32, shape (n_directions, n_directions).

    Returns:
        W, of the same shape.
    """
    eye = torch.eye(len(covariance), device=covariance.device, dtype=torch.float64)
    ridge = (LEAST_RIDGE * covariance.diagonal().max().double()).clamp(min=RIDGE)
    lower = torch.linalg.cholesky(covariance.double() + ridge * eye)
    return torch.linalg.solve_triangular(lower, eye, upper=False).T.float().contiguous()


def measure_whitened(
    x: Tensor,
    directions: Tensor,
    offset: Tensor,
    centre: Tensor,
    white: Tensor,
    *,
    gather: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """Measure each token's Mahalanobis distance from its nearest centre in the subspace.

    Ours: |(z − c)·W| / √n − 1 with z = x·P − o and n directions. Nearest is Euclidean in the
    subspace.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        directions: P, float32, shape (d_in, n_directions).
        offset: o, shape (n_directions,).
        centre: c, shape (n_clusters, n_directions).
        white: W, shape (n_directions, n_directions).
        gather: as for :func:`measure`.
        keep: as for :func:`measure`.

    Returns:
        As :func:`measure`.
    """

    def of_block(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = torch.addmm(offset, part, directions, beta=-1)
        nearest, diff = _from_nearest(projected, centre)
        far = torch.linalg.vector_norm(diff @ white, dim=-1) / math.sqrt(len(white))
        return nearest, diff, far - 1

    sums = Moments.zeros(centre, white) if gather else None
    return _over_blocks(x, of_block, sums, keep, pooled=True), sums


# --- Discriminant: between training data and other text ---------------------------------------


def discriminant(training: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Fit Fisher's linear discriminant between two samples, with a ridge.

    Source: Friedman 1989, regularised discriminant analysis: w = (C + λ)⁻¹·(μ_other − μ_training)
    in standardised channels, with C the mean of the two covariances. With one covariance for
    both, the difference of the squared Mahalanobis distances to the two samples (arXiv
    2106.09022) is linear in the token, so that one product measures it in all channels.

    Args:
        training: tokens of the training data, float32, shape (n_training, d_in).
        other: tokens of other text, float32, shape (n_other, d_in).

    Returns:
        w in the original channels, shape (d_in,), and the offset o, shape (). x·w − o is below 0 on
        the side of the training data.
    """
    both = torch.cat([training, other])
    mean, scale = both.mean(0), channel_scale(both.var(0, correction=0))
    samples = [(x - mean) * scale for x in (training, other)]
    centres = [x.mean(0) for x in samples]
    spread = torch.cat(
        [(x - c) * (2 * len(x)) ** -0.5 for x, c in zip(samples, centres)]
    )  # SᵀS is the mean covariance
    direction = _solve(spread, centres[1] - centres[0]) * scale
    middle = mean + (centres[0] + centres[1]) / 2 / scale
    return direction, middle @ direction


def gap_to_other(training: Tensor, other: Tensor) -> float:
    """Measure how far from the training data other text begins, along their discriminant.

    Ours. Other text is measured half by half, with the discriminant between the training data and
    the other half: text that a discriminant was fitted to lies too far out.

    Args:
        training: tokens of the training data, float32, shape (n_training, d_in).
        other: tokens of other text, at least 2, float32, shape (n_other, d_in).

    Returns:
        Distance from the mean of the training data within which ``BEGINS`` of the other text lie,
        in standard deviations of the training data.
    """
    halves, scaled = other.tensor_split(2), []
    for half, rest in (halves, halves[::-1]):
        direction, offset = discriminant(training, rest)
        near, far = training @ direction - offset, half @ direction - offset
        scaled.append((far - near.mean()) / (near.std(correction=0) + 1e-12))
    return float(torch.cat(scaled).sort().values[int(BEGINS * len(other))])


def measure_along(
    x: Tensor,
    direction: Tensor,
    offset: Tensor,
    *,
    gather: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """Measure how far along a direction each token lies: x·w − o.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        direction: w, shape (d_in,).
        offset: o, shape ().
        gather: as for :func:`measure`; moments are those of the distances, without centres.
        keep: as for :func:`measure`.

    Returns:
        As :func:`measure`.
    """

    def of_block(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest = torch.zeros(len(part), dtype=torch.long, device=part.device)
        return nearest, part[:, :0], part @ direction - offset

    sums = no_centres(direction) if gather else None
    return _over_blocks(x, of_block, sums, keep), sums


def no_centres(like: Tensor) -> Moments:
    """Make moments of no tokens, for distances alone, on the device of ``like``."""
    nothing = like.new_zeros(1, 0)
    return Moments.zeros(nothing, nothing)


# --- Shared -----------------------------------------------------------------------------------


def block_size(x: Tensor) -> int:
    """Choose tokens per block: what fits a core's cache on a CPU, few launches elsewhere."""
    values = 2**18 if x.device.type == "cpu" else 2**26
    return max(1, values // max(x.shape[-1], 1))


def _over_blocks(
    x: Tensor,
    of_block: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    sums: Moments | None,
    keep: Tensor | None,
    *,
    pooled: bool = False,
) -> Tensor:
    """Measure tokens block by block, so that no float32 copy of x is held.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        of_block: from some tokens in float32 to nearest centres, x − c and distances.
        sums: moments to add the tokens to; None to add nothing.
        keep: as for :func:`measure`.
        pooled: as for :meth:`Moments.add`.

    Returns:
        Raw distances, float32, shape (n_tokens,).
    """
    block = block_size(x)
    if sums is None and len(x) <= block:
        return of_block(x.float())[2]
    raw = torch.empty(len(x), device=x.device, dtype=torch.float32)
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        nearest, diff, far = of_block(x[part].float())
        raw[part] = far
        if sums is not None:
            sums.add(nearest, diff, far, None if keep is None else keep[part], pooled=pooled)
    return raw


def _from_nearest(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Find each token's nearest centre, shape (n_tokens,), and x − c, shape (n_tokens, d)."""
    if len(centre) == 1:
        return torch.zeros(len(x), dtype=torch.long, device=x.device), x - centre
    # argmin of |x − c|² is argmin of |c|²/2 − x·c
    half_squares = centre.square().sum(-1) / 2
    nearest = torch.addmm(half_squares, x, centre.T, alpha=-1).argmin(-1)
    return nearest, x - centre[nearest]


def _solve(spread: Tensor, gap: Tensor) -> Tensor:
    """Solve (SᵀS + λ)·w = gap for S of shape (n, d), through the smaller of its two sides."""
    n, d = spread.shape
    ridge = DISCRIMINANT_RIDGE
    if d <= n:
        return torch.linalg.solve(spread.T @ spread + ridge * torch.eye(d).to(gap), gap)
    inner = torch.linalg.solve(spread @ spread.T + ridge * torch.eye(n).to(gap), spread @ gap)
    return (gap - spread.T @ inner) / ridge
