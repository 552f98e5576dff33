"""Ways of fine-tuning by name: SLIM, its ablations, and the methods that it is compared with.

A new method is a line in ``METHODS``, options of SLIM or LoRA or a small class of its own, and its
summary in ``budwood.catalogue``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from budwood import catalogue
from budwood.checks import need_int, need_number
from budwood.errors import BudwoodError, InputError, first_line
from budwood.loading import third_party_warnings_off
from budwood.registry import Registry
from budwood.spec import parse_spec
from budwood.tune.config import SlimConfig
from budwood.tune.encoding import EncodedExample
from budwood.tune.fitting import N_TEXTS, fit_discriminant
from budwood.tune.model import is_linear
from budwood.tune.targets import default_targets, later_layers, with_attention

_PLENTY = 10**6
"""Supervised tokens that a SLIM tuner counts on until it is fitted to the data."""


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

    def __post_init__(self) -> None:
        for name, place in (("r", "rank"), ("seed", "seed")):
            if name in self.extra:
                raise InputError(
                    f"{name}={self.extra[name]!r} is not an option of a method; give --{place}"
                )
        weights = {"weight_decay": self.weight_decay, "kl": self.kl}
        need_number(lambda value: 0 <= value < math.inf, "number of at least 0", **weights)
        allowed = "number above 0 and up to 1"
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
        """Arguments of :func:`budwood.tune.train.train` that depend on the method.

        Args:
            texts: :attr:`n_texts` self-generated texts.
        """
        return {
            "weight_decay": self.weight_decay,
            "kl": self.kl,
            "texts": texts if self.kl_on_texts else (),
            "strength": self.strength,
        }


@dataclass(frozen=True)
class Lora(Tuner):
    """Low-rank adaptation of the MLP projections of all layers.

    Source: arXiv 2106.09685.
    """

    alpha: float = 2.0
    dropout: float = 0.0

    use_dora: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        bent = self.use_dora or {"use_dora", "init_lora_weights"} & set(self.extra)
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
            "task_type": "CAUSAL_LM",
        }
        try:
            return LoraConfig(r=rank, **{**options, **self.extra})
        except (TypeError, ValueError) as error:  # an unknown option
            raise InputError(f"LoRA: {first_line(error)}") from error

    def targets(self, model: Any) -> str:
        """A regular expression of the modules to adapt."""
        return default_targets(model.config.to_dict())


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA with the magnitude of each column apart; arXiv 2402.09353."""

    use_dora: ClassVar[bool] = True


@dataclass(frozen=True)
class LoraTexts(Lora):
    """LoRA that stays close to the base model on self-generated text."""

    kl: float = 1.0
    texts: int = N_TEXTS

    kl_on_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        need_int(1, texts=self.texts)

    @property
    def n_texts(self) -> int:
        return self.texts


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


@dataclass(frozen=True)
class Slim(Tuner):
    """SLIM with the config of :meth:`SlimConfig.recommended`, and options set in ``extra``.

    Attributes:
        texts: self-generated texts that the discriminant tells the training data from. 0 for the
            whitened distance, None to decide by the amount of data.
        strength: ours, as of any tuner: on validation data it forgets less and costs nothing.
        n_supervised_tokens: amount of training data, set by :meth:`fitted_to`.
    """

    texts: int | None = None
    strength: float = 0.7
    n_supervised_tokens: int = _PLENTY

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts is not None:
            need_int(0, texts=self.texts)
        config = self.config(1, None, 0)  # refuses unknown options before a model is loaded
        if self.texts == 0 and _needs_texts(config):
            raise InputError(
                f"texts=0 and distance={config.distance!r}, which needs self-generated texts; give "
                "more texts, or another distance"
            )
        if self.texts and not _needs_texts(config):
            raise InputError(
                f"texts={self.texts} and distance={config.distance!r}, which takes no "
                "self-generated text; leave texts out, or take distance=discriminant"
            )

    def config(self, rank: int, model: Any, seed: int) -> SlimConfig:
        options = dict(self.extra)
        if self.texts is not None:
            options.setdefault("distance", "discriminant" if self.texts else "whitened")
        try:
            return SlimConfig.recommended(self.n_supervised_tokens, r=rank, seed=seed, **options)
        except TypeError as error:  # an unknown option
            raise InputError(f"SLIM: {error}") from error

    def fitted_to(self, n_supervised_tokens: int) -> Slim:
        return dataclasses.replace(self, n_supervised_tokens=n_supervised_tokens)

    @property
    def n_texts(self) -> int:
        if not _needs_texts(self.config(1, None, 0)):
            return 0
        return N_TEXTS if self.texts is None else self.texts

    def prepare(
        self,
        adapted: Any,
        tokenizer: Any,
        rows: Sequence[EncodedExample],
        texts: Sequence[EncodedExample],
    ) -> None:
        if texts:
            fit_discriminant(adapted, tokenizer, rows, texts)


@dataclass(frozen=True)
class Method:
    """What a name of ``budwood.catalogue.TUNERS`` stands for.

    Attributes:
        kind: the tuner's class.
        options: values of the class's fields, and options of the adapter's config.
    """

    kind: type[Tuner]
    options: Mapping[str, Any] = field(default_factory=dict)


def _slim(**options: Any) -> Method:
    return Method(Slim, options)


METHODS = Registry(
    "tuning method",
    {
        "lora": Method(Lora),
        # It kept the target score and halved the divergence (benchmarks/LOG.md, 2026-11-22).
        "lora-wd": Method(Lora, {"weight_decay": 30.0}),
        "lora-kl": Method(Lora, {"kl": 1.0}),
        "lora-own": Method(LoraTexts),
        "lora-late": Method(LoraLate),
        "lora-attn": Method(LoraAttention),
        "dora": Method(Dora),
        "moe": _slim(
            strength=1.0, n_identity=0, clustering=False, yielding=False, merging=False, l1=0.0
        ),
        "slim": _slim(),
        "slim-no-identity": _slim(n_identity=0, yielding=False),
        "slim-no-router": _slim(router=False),
        "slim-no-clustering": _slim(distance="whitened", clustering=False),
        "slim-no-yielding": _slim(yielding=False),
        "slim-no-merging": _slim(merging=False),
        "slim-no-l1": _slim(l1=0.0),
        "slim-whitened": _slim(distance="whitened"),
        "slim-paper": _slim(
            strength=1.0,
            distance="max",
            fit_on="all",
            skip_first=0.0,
            yield_at="module",
            margin=0.0,
        ),
        "slim-max": _slim(distance="max"),
        "slim-rms": _slim(distance="rms"),
        "slim-all-tokens": _slim(fit_on="all"),
        "slim-by-module": _slim(yield_at="module"),
        "slim-all-layers": _slim(skip_first=0.0),
        "slim-mask": _slim(merge_inference="mask"),
    },
)
"""Name → tuner and options. Summaries are in ``budwood.catalogue``."""


def parse_tuner(text: str) -> Tuner:
    """A tuner from its name, with options: ``slim`` or ``lora-wd:weight_decay=3``.

    Args:
        text: a name in ``METHODS``; behind a colon, ``key=value`` joined by ``+``. Keys are the
            tuner's own fields, or options of its PEFT config.

    Raises:
        UnknownNameError: there is no such method.
        InputError: an option is malformed.
    """
    chosen = method_of(text)
    given = {**chosen.options, **parse_spec(text)[1]}
    names = {one.name for one in dataclasses.fields(chosen.kind)}
    names -= {"extra", "n_supervised_tokens"}
    own = {key: value for key, value in given.items() if key in names}
    return chosen.kind(**own, extra={key: given[key] for key in given if key not in names})


def method_of(text: str) -> Method:
    """The entry of a method in ``METHODS``.

    Args:
        text: as :func:`parse_tuner` takes it.

    Raises:
        UnknownNameError: there is no such method.
    """
    if not isinstance(text, str):
        raise InputError(f"method={text!r}; give a name such as 'slim'")
    return METHODS.get(text.partition(":")[0].strip())


def is_ablation(text: str) -> bool:
    """Whether a method is SLIM with a part left out or changed, and so has SLIM's own rank.

    Args:
        text: as :func:`parse_tuner` takes it.
    """
    return catalogue.TUNERS[text.partition(":")[0].strip()].facts["kind"] == "ablation"


def attach(tuner: Tuner, model: Any, rank: int, seed: int) -> Any:
    """A model with a fresh adapter, drawn from a seed.

    Args:
        tuner: which adapter.
        model: the base model; its weights stay as they are.
        rank: of the adapter, or of each expert.
        seed: of its initial weights.
    """
    import peft
    import torch

    torch.manual_seed(seed)
    try:
        with third_party_warnings_off():
            return peft.get_peft_model(model, tuner.config(rank, model, seed))
    except BudwoodError:
        raise
    except (TypeError, ValueError) as error:  # PEFT on an option that it does not take
        raise InputError(f"cannot make the adapter: {error}") from error


def n_trainable(model: Any) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _needs_texts(config: SlimConfig) -> bool:
    """Whether the distance is fitted to self-generated texts as well."""
    return config.yielding and config.distance == "discriminant"
