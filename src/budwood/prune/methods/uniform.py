"""Uniform: evenly spaced tokens, the baseline that covers the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.prune.methods.base import Choice, Method


def evenly_spaced(n: int, keep: int, device: torch.device) -> Tensor:
    """The middles of ``keep`` equal stretches of 0…n−1: sorted, distinct, int64, shape (keep,)."""
    return (2 * torch.arange(keep, device=device) + 1) * n // (2 * keep)


@dataclass(frozen=True)
class Uniform(Method):
    """Keep tokens at even distances along the order in which the LLM sees them.

    The order is the raster, row by row; the distances are even along it, not in two dimensions.
    """

    name: ClassVar[str] = "uniform"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = False
    source: ClassVar[str] = "baseline"

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Choice:
        return Choice(evenly_spaced(len(visual), keep, visual.device))
