"""Prompt tokens: before the first block, or fresh ones in every block.

Source: Visual Prompt Tuning (arXiv 2203.12119), VPT-Shallow and VPT-Deep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.points.adapters.base import Adapter, AdapterConfig
from budwood.points.adapters.fca import Fused, attending
from budwood.points.encoders.base import Around, PointEncoder
from budwood.points.encoders.blocks import Block, Context


@dataclass(frozen=True)
class VptConfig(AdapterConfig):
    """Options of prompt tuning.

    Attributes:
        n_tokens: prompts, in each block for the deep kind.
        std: their spread at the start.
    """

    n_tokens: int = 8
    std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_tokens < 1:
            raise InputError(f"n_tokens={self.n_tokens} must be 1 or more")
        if self.std <= 0:
            raise InputError(f"std={self.std} must be above 0")


class ShallowPrompts(Adapter):
    """Prompts that enter before the first block and pass through all; pooling does not see them."""

    name: ClassVar[str] = "vpt-shallow"
    Config: ClassVar[type[AdapterConfig]] = VptConfig
    config: VptConfig

    def __init__(self, encoder: PointEncoder, config: VptConfig | None = None) -> None:
        super().__init__(encoder, config)
        self.tokens = nn.Parameter(torch.randn(self.config.n_tokens, encoder.dim) * self.config.std)

    def around(self, share: float) -> Around:
        carried: Tensor = self.tokens

        def layer(index: int, block: Block, x: Tensor) -> Tensor:
            nonlocal carried
            joined = block(torch.cat([x, carried.expand(len(x), -1, -1)], dim=1))
            carried = joined[:, x.shape[1] :]
            own = joined[:, : x.shape[1]]
            return own if share == 1 else torch.lerp(block(x), own, share)

        return layer


class DeepPrompts(Adapter):
    """Prompts of their own in every block, dropped after it."""

    name: ClassVar[str] = "vpt-deep"
    Config: ClassVar[type[AdapterConfig]] = VptConfig
    config: VptConfig

    def __init__(self, encoder: PointEncoder, config: VptConfig | None = None) -> None:
        super().__init__(encoder, config)
        size = (len(self.blocks), self.config.n_tokens, encoder.dim)
        self.tokens = nn.Parameter(torch.randn(size) * self.config.std)

    def contexts(self) -> list[Context]:
        """What each block attends to besides the points."""
        return [block.context(tokens) for block, tokens in zip(self.blocks, self.tokens)]

    def around(self, share: float) -> Around:
        return attending(self.contexts(), share)

    def fuse(self) -> Fused:
        """The same function with keys and values computed once; not for training."""
        return Fused.of(self, self.contexts())
