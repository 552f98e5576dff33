"""What every way of fine-tuning has in common, and LoRA with its variants.

:mod:`budwood.tune.methods` knows them by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from budwood.checks import need_int, need_number
from budwood.errors import InputError, UnsupportedModelError, first_line
from budwood.tune.config import SlimConfig
from budwood.tune.data.encoding import EncodedExample
from budwood.tune.slim.architectures import default_targets, later_layers, with_attention
from budwood.tune.slim.fitting import N_TEXTS
from budwood.tune.slim.fused_experts import is_fused
from budwood.tune.slim.targets import decoder_modules, is_linear


@dataclass(frozen=True)
class Tuner:
    """A PEFT adapter and what its training adds to the loss.

    Attributes:
        weight_decay: AdamW's, on the adapter.
        kl: weight of the divergence from the base model, on the prompts that are trained on or on
            self-generated text.
        strength: adapter strength at the end of training, in (0, 1].
        extra: further options, for the adapter's config.
    """

    weight_decay: float = 0.0
    kl: float = 0.0
    strength: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    kl_on_texts: ClassVar[bool] = False
    """Whether ``kl`` is taken on self-generated text, and not on prompts."""
    own_rank: ClassVar[int] = 0
    """The rank that a comparison takes; 0 for one with as many parameters as the reference."""

    def __post_init__(self) -> None:
        for name, place in (("r", "rank"), ("seed", "seed")):
            if name in self.extra:
                raise InputError(
                    f"{name}={self.extra[name]!r} is not an option of a method; give --{place}"
                )
        weights = {"weight_decay": self.weight_decay, "kl": self.kl}
        need_number(lambda value: 0 <= value < math.inf, "number of at least 0", **weights)
        allowed = "number above 0 and up to 1"
        if self.strength is not None:
            need_number(lambda value: 0 < value <= 1, allowed, strength=self.strength)

    def config(self, rank: int, model: Any, seed: int) -> Any:
        """The PEFT config.

        Args:
            rank: rank of the adapter, or of each expert.
            model: the base model.
            seed: seed of whatever the adapter draws by itself.
        """
        raise NotImplementedError

    def fitted_to(self, n_supervised_tokens: int) -> Tuner:
        """The tuner for training data of some size.

        Args:
            n_supervised_tokens: supervised tokens in one pass over the data.
        """
        return self

    def suited_to(self, tokenizer: Any) -> Tuner:
        """The tuner for a tokenizer, whose chat template may not allow self-generated text."""
        return self

    def ranks(self, model: Any) -> Sequence[int]:
        """The ranks that there are, in rising order; none for all."""
        return ()

    def attached(self, adapted: Any) -> None:
        """Set up a model that has just got its adapter, fresh or to be filled by a checkpoint."""

    def n_trained(self, adapted: Any) -> int:
        """Parameters that training changes."""
        return n_trainable(adapted)

    @property
    def n_texts(self) -> int:
        """Self-generated texts that training needs."""
        return 0

    def prepare(
        self,
        adapted: Any,
        tokenizer: Any,
        rows: Sequence[EncodedExample],
        texts: Sequence[EncodedExample],
    ) -> None:
        """Prepare a fresh adapter for its first step.

        Args:
            adapted: the model with the adapter.
            tokenizer: of the model.
            rows: training data.
            texts: :attr:`n_texts` self-generated texts.
        """

    def training(self, texts: Sequence[EncodedExample]) -> dict[str, Any]:
        """Arguments of :func:`budwood.tune.training.run.train` that depend on the method.

        Args:
            texts: :attr:`n_texts` self-generated texts.
        """
        return {
            "weight_decay": self.weight_decay,
            "kl": self.kl,
            "texts": texts if self.kl_on_texts else (),
            "strength": self.strength,
        }


def n_trainable(model: Any) -> int:
    """Parameters that get gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def mlp_targets(model: Any) -> str:
    """A regular expression of the MLP projections of a model.

    Raises:
        UnsupportedModelError: the model has fused experts.
    """
    modules = dict(decoder_modules(model))
    fused = next((name for name, module in modules.items() if is_fused(module)), None)
    if fused is not None:
        raise UnsupportedModelError(
            f"{fused!r} holds fused experts, which this comparison adapts with SLIM's methods "
            "alone; take --method slim, or PEFT's LoRA with target_parameters"
        )
    linear = (name for name, module in modules.items() if is_linear(module))
    return default_targets(model.config.to_dict(), linear)


def peft_config(kind: Any, name: str, options: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """Make a config of PEFT for a causal language model.

    Args:
        kind: its class.
        name: of the method, for messages.
        options: what the method sets.
        extra: what the user sets, which takes precedence.

    Raises:
        InputError: there is no such option.
    """
    try:
        return kind(**{**options, "task_type": "CAUSAL_LM", **extra})
    except (TypeError, ValueError) as error:  # an unknown option
        raise InputError(f"{name}: {first_line(error)}") from error


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
        return peft_config(LoraConfig, "LoRA", {"r": rank, **options}, self.extra)

    def targets(self, model: Any) -> str:
        """A regular expression of the modules to adapt."""
        return mlp_targets(model)


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

    skip_first: float = SlimConfig.skip_first

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
