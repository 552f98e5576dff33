"""Distance in a whitened subspace: how unusual a token is, correlations between channels included.

Ours, a deviation from SLIM, whose distance looks at each channel by itself. What tells other text
from training data lies in directions in which training data hardly vary, and these are combinations
of channels. A full covariance would be as large as the layer; a few random directions with their
small covariance come near it. Pure tensor functions, float32 and outside autograd.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from budwood.tune.clustering import Moments, from_nearest, moves, over_blocks

RIDGE = 1e-3
"""Added to variances that are about 1."""
LEAST_RIDGE = 1e-5
"""Added as a share of the largest variance: float32 knows a covariance to no more than that."""


def random_directions(d_in: int, n_directions: int, *, seed: int, key: str) -> Tensor:
    """Random signs over √d_in: of an input of unit variances they give outputs of unit variances.

    A function of its arguments alone, and so never saved; NumPy promises that the stream of this
    generator stays as it is.

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
    """A matrix W such that rows of that covariance times W are white; shape as given.

    Args:
        covariance: float32, shape (n_directions, n_directions).
    """
    eye = torch.eye(len(covariance), device=covariance.device, dtype=torch.float64)
    ridge = (LEAST_RIDGE * covariance.diagonal().max().double()).clamp(min=RIDGE)
    lower = torch.linalg.cholesky(covariance.double() + ridge * eye)
    return torch.linalg.solve_triangular(lower, eye, upper=False).T.float().contiguous()


def project(x: Tensor, directions: Tensor, offset: Tensor) -> Tensor:
    """Places in the subspace: x·P − o.

    Args:
        x: layer inputs, float32, shape (n_tokens, d_in).
        directions: P, shape (d_in, n_directions).
        offset: o, shape (n_directions,).
    """
    return torch.addmm(offset, x, directions, beta=-1)


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
    """Mahalanobis distance of each token to its nearest centre, in the subspace.

    Ours: d = |(z − c)·W| / √n − 1 with z = x·P − o and n directions. Nearest is meant in the
    Euclidean sense in the subspace. To be called outside autocast.

    Args:
        x: layer inputs, shape (n_tokens, d_in), floating point.
        directions: P, float32, shape (d_in, n_directions).
        offset: o, shape (n_directions,).
        centre: shape (n_clusters, n_directions).
        white: W, shape (n_directions, n_directions).
        gather: also return moments.
        keep: bool, shape (n_tokens,): tokens that enter the moments; None for all.

    Returns:
        Raw distances, float32, shape (n_tokens,), and the moments or None.
    """

    def of_block(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest, diff = from_nearest(project(part, directions, offset), centre)
        far = torch.linalg.vector_norm(diff @ white, dim=-1) / math.sqrt(len(white))
        return nearest, diff, far - 1

    sums = Moments.zeros(centre, white) if gather else None
    return over_blocks(x, of_block, sums, keep, pooled=True), sums


def slide_whitened(
    centre: Tensor, covariance: Tensor, moments: Moments, momentum: float
) -> tuple[Tensor, Tensor]:
    """Centres, and the covariance around them, after one optimiser step.

    Centres move as in :func:`budwood.tune.clustering.slide`. The covariance is shared by all
    centres, since one of each would need more tokens than a run has, and moves by ``momentum``.

    Args:
        centre: shape (n_clusters, n_directions).
        covariance: shape (n_directions, n_directions).
        moments: around ``centre``.
        momentum: in (0, 1].

    Returns:
        New centre and covariance; unchanged if the step had no token.
    """
    m, shift = moves(moments, momentum)
    n = moments.count.sum()
    rate = momentum * (n > 0)
    return centre + m * shift, (1 - rate) * covariance + rate * moments.second / n.clamp(min=1)
