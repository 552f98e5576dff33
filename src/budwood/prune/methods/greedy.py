"""Steps that greedy methods share. None of them waits for a GPU.

Cosines are rounded to six decimals. Equal tokens then have equal scores, whatever order a device
adds in, but for the few cosines that lie halfway between two decimals. Ties go to the lower index
as everywhere.

Memory: a table of similarities has at most ``MOST_FLOATS`` entries (256 MiB). Up to 8,192 tokens
that is every pair. With more, the tokens to be covered are an evenly spaced subset of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from budwood.prune.methods.scores import evenly_spaced

MOST_FLOATS = 2**26
"""Entries of the largest table of similarities."""

DECIMALS = 6
_SMALL = 1e-5
_TINY = torch.finfo(torch.float32).tiny
# What fits in the cache of a CPU core; a GPU wants few launches instead.
_FLOATS_AT_ONCE = {"cpu": 2**18}
_FLOATS_AT_ONCE_ELSEWHERE = 2**24
_FRESH_AT_ONCE = 64
_READS_VALUES = ("cpu",)  # devices whose values may be read, since nothing waits for them


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, float32, same shape; rows of zeros, or of no finite length, are zeros."""
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x / length.clamp_min(1e-12)).nan_to_num(0.0, 0.0, 0.0)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of unit rows, rounded, shape (n_a, n_b)."""
    return (a @ b.T).round(decimals=DECIMALS)


def centred(visual: Tensor) -> Tensor:
    """Tokens less their mean, as unit rows; those that are the mean are zeros."""
    x = visual.float()
    difference = x - x.mean(0)
    length = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    is_mean = length <= _SMALL * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return unit(difference.masked_fill(is_mean, 0.0))


def minmax(x: Tensor) -> Tensor:
    """Scale to [0, 1]; what is the same everywhere becomes 1."""
    low, high = x.aminmax()
    scaled = (x - low) / (high - low).clamp_min(_TINY)
    return torch.where(high > low, scaled, torch.ones_like(x)).nan_to_num(0.0)


def mean_cosine(units: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of each token (n, d_model) with the words (n_text, d_model); 0 without words."""
    if len(text) == 0:
        return units.new_zeros(len(units))
    return cosines(unit(text), units).mean(0)


def reported(relevance: Tensor, text: Tensor) -> Tensor:
    """What a selection reports as relevance: flat and summing to 1 without words."""
    if len(text) == 0:
        return torch.full_like(relevance, 1 / len(relevance))
    return relevance


def targets_of(units: Tensor, n_others: int = 0) -> Tensor:
    """Rows to cover: all, or as many evenly spaced ones as a table has room for.

    Args:
        units: unit rows, shape (n, d).
        n_others: other targets that go into the table.
    """
    n = len(units)
    n_targets = max(1, MOST_FLOATS // n - n_others)
    return units if n_targets >= n else units[evenly_spaced(n, n_targets, units.device)]


def greedy(
    n: int,
    keep: int,
    device: torch.device,
    score: Callable[[], Tensor],
    add: Callable[[Tensor], None],
    first: Tensor | None = None,
) -> Tensor:
    """Take the token of the highest score, ``keep`` times; ties go to the lower index.

    Args:
        n: tokens.
        keep: how many to take.
        device: of the scores.
        score: gives the scores of all tokens, float32, shape (n,), as things stand.
        add: is called with each token that is taken but the last, int64, shape (1,).
        first: tokens to begin with, int64, shape (n_first,), n_first < keep; None for none.

    Returns:
        Tokens in the order in which they were taken, int64, shape (keep,).
    """
    if keep == n:
        return torch.arange(n, device=device)
    taken = torch.zeros(n, dtype=torch.bool, device=device)
    chosen = [] if first is None else [first[i : i + 1] for i in range(len(first))]
    for index in chosen:
        taken.index_fill_(0, index, True)
        add(index)
    for step in range(len(chosen), keep):
        index = score().masked_fill(taken, -math.inf).argmax(0, keepdim=True)
        chosen.append(index)
        if step + 1 < keep:
            taken.index_fill_(0, index, True)
            add(index)
    return torch.cat(chosen)


class Coverage:
    """How much better each token would cover the targets than those taken so far.

    The gain of token i is ``Σ_j w_j · max(0, table_ij − best_j)``, where ``best_j`` is the largest
    ``table_ij`` of a taken token, at first 0. This is facility location, and maximum coverage.

    Args:
        table: how well each token covers each target, float32, shape (n_tokens, n_targets).
        weights: of the targets, float32, shape (n_targets,); None counts all as 1.
    """

    def __init__(self, table: Tensor, weights: Tensor | None = None) -> None:
        self.table, self.weights = table, weights
        self.best = table.new_zeros(table.shape[1])
        most = _FLOATS_AT_ONCE.get(table.device.type, _FLOATS_AT_ONCE_ELSEWHERE)
        self._rows = max(1, most // table.shape[1])

    def gains(self, tokens: Tensor | None = None) -> Tensor:
        """Gain of some tokens (n,), or of all, float32, one each."""
        table = self.table if tokens is None else self.table.index_select(0, tokens)
        parts = []
        for rows in table.split(self._rows):
            gain = (rows - self.best).clamp_min_(0.0)
            parts.append((gain if self.weights is None else gain.mul_(self.weights)).sum(1))
        return torch.cat(parts)

    def add(self, index: Tensor) -> None:
        """Take a token, int64, shape (1,)."""
        self.best = torch.maximum(self.best, self.table.index_select(0, index)[0])


def most_covering(units: Tensor, keep: int, quality: Tensor) -> Tensor:
    """Take the token of the largest quality times coverage gain, ``keep`` times.

    A token covers another by their cosine. See :class:`Coverage` for gains and targets.

    Args:
        units: unit rows, shape (n, d).
        keep: how many to take.
        quality: factor per token, shape (n,).

    Returns:
        Tokens in the order in which they were taken, int64, shape (keep,).
    """
    return most_gaining(Coverage(cosines(units, targets_of(units))), keep, quality)


def most_gaining(
    coverage: Coverage, keep: int, quality: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """Take the token of the largest gain, times its quality if given, ``keep`` times.

    Gains only fall as more is covered, so that an old one is a bound. On a CPU only those tokens
    are looked at again whose bounds are the highest; the result is the same.

    Source: Minoux, Accelerated greedy algorithms for maximizing submodular set functions, 1978.

    Args:
        coverage: of nothing yet.
        keep: how many to take.
        quality: factor per token, at least 0, shape (n,); None counts all as 1.
        first: as in :func:`greedy`.

    Returns:
        Tokens in the order in which they were taken, int64, shape (keep,).
    """
    n, device = coverage.table.shape[0], coverage.table.device

    def score(tokens: Tensor | None = None) -> Tensor:
        gains = coverage.gains(tokens)
        if quality is None:
            return gains
        return gains * (quality if tokens is None else quality[tokens])

    if device.type not in _READS_VALUES:
        return greedy(n, keep, device, score, coverage.add, first)
    bounds: Tensor | None = None

    def bounded() -> Tensor:
        nonlocal bounds
        if bounds is None:
            bounds = score()
            return bounds
        fresh = torch.zeros(n, dtype=torch.bool)
        while not fresh[bounds.argmax(0)]:
            old = bounds.masked_fill(fresh, -math.inf)
            again = old.topk(min(_FRESH_AT_ONCE, n)).indices
            bounds[again], fresh[again] = score(again), True
        return bounds

    def add(index: Tensor) -> None:
        coverage.add(index)
        if bounds is not None:
            bounds[index] = -math.inf

    return greedy(n, keep, device, bounded, add, first)


def farthest_points(units: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """Max–min diversity: take the token whose nearest taken one is farthest, ``keep`` times.

    Distance is 1 − cosine, times the quality of the token. The first is the token that is farthest
    from its nearest neighbour.

    Args:
        units: unit rows, shape (n, d).
        keep: how many to take.
        quality: factor per token, shape (n,); None counts all as 1.

    Returns:
        Tokens in the order in which they were taken, int64, shape (keep,).
    """
    nearest = _distance_to_neighbour(units)
    started = False

    def score() -> Tensor:
        return nearest if quality is None else quality * nearest

    def add(index: Tensor) -> None:
        nonlocal nearest, started
        distance = 1 - cosines(units, units.index_select(0, index)).squeeze(1)
        nearest = torch.minimum(nearest, distance) if started else distance
        started = True

    return greedy(len(units), keep, units.device, score, add)


def greedy_map(units: Tensor, quality: Tensor, keep: int) -> Tensor:
    """Greedy MAP of a determinantal point process, by an incremental Cholesky factorisation.

    The kernel is ``diag(q) · cos · diag(q)``. Each step takes the token with the largest residual
    variance given those taken. Residuals below 1e-5 of the largest entry count as 0. Memory: the
    factor, ``keep · n`` floats.

    Source: Chen, Zhang and Zhou, NeurIPS 2018, algorithm 1. Deviation: where no residual is left
    (there are never more than d), the algorithm stops; here the tokens of the highest quality
    follow, since exactly ``keep`` are asked for.

    Args:
        units: unit rows, shape (n, d).
        quality: q, in [0, 1], shape (n,).
        keep: how many to take.

    Returns:
        Tokens in the order in which they were taken, int64, shape (keep,).
    """
    residual = quality.square() * (units.square().sum(1) > 0.5)
    floor = _SMALL * residual.max()
    factor = units.new_empty(keep, len(units))
    n_taken = 0

    def score() -> Tensor:
        return torch.where(residual > floor, residual, quality - 2)  # those left come first

    def add(index: Tensor) -> None:
        nonlocal residual, n_taken
        row = cosines(units, units.index_select(0, index)).squeeze(1)
        row = row * quality * quality.index_select(0, index)
        before = factor[:n_taken]
        row = row - (before * before.index_select(1, index)).sum(0)
        row = row / residual.index_select(0, index).clamp_min(floor.clamp_min(_TINY)).sqrt()
        factor[n_taken] = row
        # Sums over the factor may differ in the last bit between equal tokens.
        residual = (residual - row.square()).round(decimals=DECIMALS + 1)
        n_taken += 1

    return greedy(len(units), keep, units.device, score, add)


def closest(a: Tensor, b: Tensor) -> Tensor:
    """Largest cosine of each unit row of a with one of b, shape (n_a,), in blocks."""
    return torch.cat([cosines(rows, b).amax(1) for _, rows in in_blocks(a, len(b))])


def _distance_to_neighbour(units: Tensor) -> Tensor:
    """1 − cosine of each row with the nearest other one, shape (n,), in blocks."""
    n = len(units)
    parts = []
    for start, rows in in_blocks(units, n):
        table = cosines(rows, units)
        table.diagonal(start).fill_(-1.0)  # a row is not its own neighbour
        parts.append(1 - table.amax(1))
    return torch.cat(parts)


def in_blocks(rows: Tensor, n_columns: int) -> list[tuple[int, Tensor]]:
    """Views of rows in blocks, with the place of the first, whose tables of n_columns are small."""
    size = max(1, MOST_FLOATS // 4 // n_columns)
    return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]
