"""Baselines that look at nothing: random tokens and evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_seed
from budwood.prune.methods.base import Method, Selection
from budwood.prune.methods.scores import evenly_spaced


@dataclass(frozen=True)
class Random(Method):
    """Keep a random subset of the tokens, drawn without replacement.

    Without a ``generator`` each call draws anew from ``seed``, so equal calls agree. With one the
    draws follow its stream; a CPU generator gives the same tokens whatever the model's device.

    Args:
        seed: seed of the draw where no generator is given.

    Raises:
        InputError: ``seed`` is out of range.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = False
    source: ClassVar[str] = "baseline"

    def __post_init__(self) -> None:
        need_seed(self.seed)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        draw = generator if generator is not None else torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(visual), generator=draw, device=draw.device)
        return Selection(order[:keep].to(visual.device, non_blocking=True))


@dataclass(frozen=True)
class Uniform(Method):
    """Keep tokens at even distances along the order in which the LLM sees them.

    The order is the raster, row by row. Distances are even along it, not in two dimensions.
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
    ) -> Selection:
        return Selection(evenly_spaced(len(visual), keep, visual.device))
