"""LoRA and its variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from budwood.checks import need_int, need_number
from budwood.errors import InputError
from budwood.tune.config import FIXED
from budwood.tune.data.encoding import EncodedExample
from budwood.tune.methods.base import Tuner, linear_mlps, peft_config
from budwood.tune.slim.architectures import later_layers, with_attention
from budwood.tune.slim.fitting import N_TEXTS
from budwood.tune.slim.targets import is_linear

_STARTS = (True, False, "gaussian", "orthogonal", "mica")
"""PEFT's ``init_lora_weights`` that leave the base model as it is and need no data."""


@dataclass(frozen=True)
class Lora(Tuner):
    """Low-rank adaptation of the MLP projections of all layers.

    Source: arXiv 2106.09685.
    """

    alpha: float = 2.0
    dropout: float = 0.0

    bends: ClassVar[bool] = False
    """Whether the adapter is more than B·A from zero."""
    use_dora: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        bent = self.bends or {"use_dora", "init_lora_weights"} & set(self.extra)
        if self.strength != 1 and bent:
            raise InputError(
                f"strength={self.strength!r} scales B, and what DoRA learns, or an adapter that "
                "does not start at zero, is more than B·A; give strength=1"
            )
        start = self.extra.get("init_lora_weights", True)
        if start not in _STARTS:
            raise InputError(
                f"init_lora_weights={start!r} is none of {', '.join(map(str, _STARTS)).lower()}; "
                "others change the base model, or have to be fitted to data (for CorDA: corda)"
            )
        need_number(lambda value: 0 < value < math.inf, "number above 0", alpha=self.alpha)
        need_number(lambda value: 0 <= value < 1, "fraction in [0, 1)", dropout=self.dropout)
        # Refuses unknown options before a model is loaded.
        self._config(1, "all-linear")

    def config(self, rank: int, model: Any, seed: int) -> Any:
        return self._config(rank, self.targets(model))

    def _config(self, rank: int, targets: str) -> Any:
        from peft import LoraConfig

        alpha = self.alpha * rank
        options = {
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets,
            "use_dora": self.use_dora,
        }
        return peft_config(self, LoraConfig, "LoRA", {"r": rank, **options})

    def targets(self, model: Any) -> str:
        """A regular expression of the modules to adapt."""
        return linear_mlps(model)


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA with the magnitude of each column apart; arXiv 2402.09353."""

    bends: ClassVar[bool] = True
    use_dora: ClassVar[bool] = True


@dataclass(frozen=True)
class TextTuner(Lora):
    """A tuner that reads self-generated text.

    Args:
        texts: how many.
    """

    texts: int = N_TEXTS

    def __post_init__(self) -> None:
        super().__post_init__()
        need_int(1, texts=self.texts)

    @property
    def n_texts(self) -> int:
        return self.texts


@dataclass(frozen=True)
class LoraTexts(TextTuner):
    """LoRA that stays close to the base model on self-generated text."""

    kl: float = 1.0

    kl_on_texts: ClassVar[bool] = True


@dataclass(frozen=True)
class LoraMasked(Lora):
    """LoRA that stays close to the base model in what it expects beside the right token.

    Source: Mask the Target, arXiv 2605.29498, from its abstract.
    """

    kl: float = 1.0

    def training(self, texts: Sequence[EncodedExample]) -> dict[str, Any]:
        return super().training(texts) | {"kl_on_others": True}


@dataclass(frozen=True)
class LoraSmall(Lora):
    """LoRA at rank 10, the best balance in PEFT's method_comparison."""

    own_rank: ClassVar[int] = 10


@dataclass(frozen=True)
class LoraLate(Lora):
    """LoRA on the later layers only, those that SLIM adapts by default."""

    skip_first: float = FIXED["skip_first"]

    def __post_init__(self) -> None:
        super().__post_init__()
        need_number(lambda value: 0 <= value < 1, "fraction in [0, 1)", skip_first=self.skip_first)

    def targets(self, model: Any) -> str:
        names = (name for name, _ in model.named_modules())
        return later_layers(super().targets(model), names, self.skip_first)


@dataclass(frozen=True)
class LoraAttention(Lora):
    """LoRA on attention as well, at a lower rank."""

    def targets(self, model: Any) -> str:
        linear = (name for name, module in model.named_modules() if is_linear(module))
        return with_attention(super().targets(model), linear)
