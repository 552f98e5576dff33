"""Adapters that replace parameters of the encoder: LoRA, norms alone (Tent), or all of them.

The encoder's parameters stay as they are: the adapter holds copies or differences.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.points.adapters.base import Adapter, AdapterConfig
from budwood.points.adapters.statistics import BATCH_NORMS
from budwood.points.encoders.base import PointEncoder


class _Copies(Adapter):
    """Trainable copies of some of the encoder's parameters."""

    def __init__(self, encoder: PointEncoder, config: AdapterConfig | None = None) -> None:
        super().__init__(encoder, config)
        self.names = self.chosen(encoder)
        self.values = nn.ParameterList(
            encoder.get_parameter(name).detach().clone() for name in self.names
        )

    @abstractmethod
    def chosen(self, encoder: PointEncoder) -> tuple[str, ...]:
        """Names of the parameters to copy."""

    def replaced(self, strength: float) -> dict[str, Tensor]:
        if strength == 1:
            return dict(zip(self.names, self.values))
        return {
            name: torch.lerp(self.encoder.get_parameter(name), value, strength)
            for name, value in zip(self.names, self.values)
        }


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Options of LoRA.

    Attributes:
        rank: of each difference, 1 or more.
        alpha: differences are scaled by ``alpha / rank``; default ``rank``.
        targets: endings of the names of linear layers in the blocks.
        stem: also train copies of the layers that make the tokens (:attr:`PointEncoder.stem`).
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    stem: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(1, rank=self.rank)
        object.__setattr__(self, "targets", tuple(self.targets))


class Lora(_Copies):
    """Low-rank differences to the linear layers of the blocks; starts at the frozen encoder.

    Source: LoRA (arXiv 2106.09685). Ours: with ``stem``, copies of the layers that make the tokens.
    """

    name: ClassVar[str] = "lora"
    Config: ClassVar[type[AdapterConfig]] = LoraConfig
    config: LoraConfig

    def __init__(self, encoder: PointEncoder, config: LoraConfig | None = None) -> None:
        super().__init__(encoder, config)
        rank = self.config.rank
        self.layers = tuple(
            name
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Linear)
            and name.startswith("blocks.")
            and name.endswith(self.config.targets)
        )
        if not self.layers:
            raise InputError(f"targets={self.config.targets} match no linear layer of a block")
        weights = [encoder.get_parameter(f"{name}.weight") for name in self.layers]
        self.down = nn.ParameterList(torch.empty(rank, w.shape[1]) for w in weights)
        self.up = nn.ParameterList(torch.zeros(w.shape[0], rank) for w in weights)
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.scale = (self.config.alpha or rank) / rank

    def chosen(self, encoder: PointEncoder) -> tuple[str, ...]:
        prefixes = tuple(f"{name}." for name in encoder.stem) if self.config.stem else ()
        return tuple(name for name, _ in encoder.named_parameters() if name.startswith(prefixes))

    def replaced(self, strength: float) -> dict[str, Tensor]:
        values = super().replaced(strength)
        for name, down, up in zip(self.layers, self.down, self.up):
            weight = self.encoder.get_parameter(f"{name}.weight")
            values[f"{name}.weight"] = weight + strength * self.scale * (up @ down)
        return values


class Tent(_Copies):
    """Scales and shifts of the norms alone; meant for :func:`budwood.points.distill.entropy`.

    Source: Tent (arXiv 2006.10726). Deviation: layer norms count too, as most encoders have few
    batch norms.
    """

    name: ClassVar[str] = "tent"

    def chosen(self, encoder: PointEncoder) -> tuple[str, ...]:
        return tuple(
            f"{name}.{last}"
            for name, module in encoder.named_modules()
            if isinstance(module, (nn.LayerNorm, *BATCH_NORMS))
            for last in ("weight", "bias")
        )


class FullFineTuning(_Copies):
    """A trainable copy of every parameter."""

    name: ClassVar[str] = "full"

    def chosen(self, encoder: PointEncoder) -> tuple[str, ...]:
        return tuple(name for name, _ in encoder.named_parameters())
