"""Random: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.prune.methods.base import Choice, Method


@dataclass(frozen=True)
class Random(Method):
    """Keep a random subset, drawn without replacement.

    Without a ``generator`` each call draws anew from ``seed``, so equal calls agree. With one the
    draws follow its stream; a CPU generator gives the same tokens whatever the model's device.

    Args:
        seed: seed of the draw where no generator is given.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
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
        draw = generator if generator is not None else torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(visual), generator=draw, device=draw.device)
        return Choice(order[:keep].to(visual.device, non_blocking=True))
