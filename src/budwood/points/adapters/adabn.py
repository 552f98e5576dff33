"""No parameters: the frozen encoder as it is, and with BatchNorm statistics of sparse clouds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from budwood.errors import InputError
from budwood.points.adapters.base import Adapter, AdapterConfig


class Frozen(Adapter):
    """The encoder as it is; the baseline of every comparison."""

    name: ClassVar[str] = "frozen"


@dataclass(frozen=True)
class AdaBNConfig(AdapterConfig):
    """AdaBN always has statistics."""

    batch_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_norm:
            raise InputError("adabn is batch_norm=True; without it, take 'frozen'")


class AdaBN(Adapter):
    """BatchNorm statistics re-estimated on the clouds to come; see :meth:`Adapter.estimate`."""

    name: ClassVar[str] = "adabn"
    Config: ClassVar[type[AdapterConfig]] = AdaBNConfig
