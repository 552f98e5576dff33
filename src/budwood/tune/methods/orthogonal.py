"""OFT and OSF, orthogonal methods of PEFT that keep more of the base model than LoRA does."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from budwood.errors import InputError
from budwood.tune.methods.base import Tuner, linear_mlps, peft_config


@dataclass(frozen=True)
class _Orthogonal(Tuner):
    """What OFT and OSF have in common: options are PEFT's, and there is no strength."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength != 1:
            raise InputError(
                f"strength={self.strength!r} is for LoRA and SLIM; give strength=1, or measure "
                "others with --strengths"
            )
        self._config(2, "all-linear")  # refuses unknown options before a model is loaded

    def config(self, rank: int, model: Any, seed: int) -> Any:
        return self._config(rank, linear_mlps(model), model)

    def _config(self, rank: int, targets: str, model: Any = None) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Oft(_Orthogonal):
    """Orthogonal fine-tuning: rotations of blocks of the input. Its rank is the size of a block.

    Source: arXiv 2306.07280, in the form of 2506.19847.
    """

    def ranks(self, model: Any) -> Sequence[int]:
        sizes = [layer.weight.shape[1] for layer in _targeted(model)]
        common = math.gcd(*sizes)
        return [size for size in range(2, common + 1) if common % size == 0]

    def _config(self, rank: int, targets: str, model: Any = None) -> Any:
        from peft import OFTConfig

        options = {"oft_block_size": rank, "target_modules": targets}
        return peft_config(self, OFTConfig, "OFT", options)


@dataclass(frozen=True)
class Osf(_Orthogonal):
    """Orthogonal subspace fine-tuning: the smallest singular directions of each weight are trained.

    Source: arXiv 2504.07097. Its rank is the number of these directions.
    """

    def _config(self, rank: int, targets: str, model: Any = None) -> Any:
        from peft import OSFConfig

        smallest = min((min(layer.weight.shape) for layer in _targeted(model)), default=rank + 1)
        if rank >= smallest:
            raise InputError(
                f"rank {rank} leaves nothing of {smallest} singular directions to keep"
            )
        options = {"effective_rank": smallest - rank, "target_modules": targets}
        return peft_config(self, OSFConfig, "OSF", options)


def _targeted(model: Any) -> list[Any]:
    """The layers that a method adapts; none without a model."""
    if model is None:
        return []
    wanted = re.compile(linear_mlps(model))
    return [module for name, module in model.named_modules() if wanted.fullmatch(name)]
