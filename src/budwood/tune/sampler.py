"""The order of training examples: random, with rows of like length in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 32
"""Batches that are sorted by length together."""


def grouped_order(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
    """A random order in which neighbours have like lengths.

    Args:
        lengths: of each example.
        batch: examples that will go into one step.
        generator: of the draws.

    Returns:
        A permutation of the indices of ``lengths``.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch * _POOL
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    ordered = [i for one in pools for i in sorted(one, key=lambda i: lengths[i])]
    batches = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    # The last one may be short, and stays last: a batch is what the loader cuts off in order.
    whole = [one for one in batches if len(one) == batch]
    shuffled = torch.randperm(len(whole), generator=generator).tolist()
    rest = [i for one in batches if len(one) < batch for i in one]
    return [i for k in shuffled for i in whole[k]] + rest


class LengthGrouped(Sampler[int]):
    """Draws :func:`grouped_order` anew for each epoch, the same for the same seed and epoch."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next; a resumed run needs that."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(grouped_order(self.lengths, self.batch, generator))

    def __len__(self) -> int:
        return len(self.lengths)
