"""Ways of fine-tuning: SLIM, its ablations and what they are compared to.

A new one is a class here, or options of SLIM, and a line in ``TUNERS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from budwood import catalogue
from budwood.errors import BudwoodError, InputError, first_line
from budwood.registry import Registry
from budwood.tune.config import SlimConfig
from budwood.tune.encoding import Row
from budwood.tune.fitting import N_TEXTS, fit_discriminant
from budwood.tune.model import is_linear
from budwood.tune.targets import default_targets, later_layers, with_attention

TUNERS = Registry("tuning method", catalogue.TUNERS)

TOKENS_A_DIRECTION = 10
"""Learnt tokens to each direction of SLIM's distance: a covariance of fewer fits these alone."""
FEWEST = 8
"""Directions, however few tokens there are."""
MARGIN_INFERENCE = 1.0
"""That of SLIM beside a discriminant, where no margin is given."""


@dataclass(frozen=True)
class Tuner:
    """A PEFT adapter and what its training adds to the loss.

    Attributes:
        weight_decay: AdamW's, on the adapter.
        kl: weight of the divergence from the base model, on the prompts that are trained on or on
            the base model's own text.
        strength: part of what was learnt that is kept at the end, in (0, 1].
        extra: further options, for the adapter's config.
    """

    weight_decay: float = 0.0
    kl: float = 0.0
    strength: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    is_ablation: ClassVar[bool] = False
    """Whether it is another method without a part, and so has that one's rank."""
    held_on_own: ClassVar[bool] = False
    """Whether ``kl`` is on text that the base model writes by itself, and not on prompts."""

    def __post_init__(self) -> None:
        for name, place in (("r", "rank"), ("seed", "seed")):
            if name in self.extra:
                raise InputError(
                    f"{name}={self.extra[name]!r} is no option of a method; give --{place}"
                )
        for name in ("weight_decay", "kl"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise InputError(f"{name}={value!r}; give a number of at least 0")
        if not _is_number(self.strength) or not 0 < self.strength <= 1:
            raise InputError(f"strength={self.strength!r}; give a number above 0 and up to 1")

    def config(self, rank: int, model: Any, seed: int) -> Any:
        """The PEFT config.

        Args:
            rank: of the adapter; of each expert where there are several.
            model: the base model.
            seed: of whatever the adapter draws by itself.
        """
        raise NotImplementedError

    def fitted_to(self, n_learnt: int) -> Tuner:
        """The tuner for training data of that size.

        Args:
            n_learnt: tokens that one pass over the data learns.
        """
        return self

    @property
    def n_own(self) -> int:
        """Texts that the base model writes by itself and that this takes."""
        return 0

    def prepare(
        self, adapted: Any, tokenizer: Any, rows: Sequence[Row], own: Sequence[Row]
    ) -> None:
        """Whatever a fresh adapter needs before its first step.

        Args:
            adapted: the model with the adapter.
            tokenizer: of the model.
            rows: training data.
            own: as many texts as :attr:`n_own` says.
        """

    def training(self, own: Sequence[Row]) -> dict[str, Any]:
        """What :func:`budwood.tune.train.train` takes beside the settings that any tuner has.

        Args:
            own: as many texts as :attr:`n_own` says.
        """
        return {
            "weight_decay": self.weight_decay,
            "kl": self.kl,
            "held": own if self.held_on_own else (),
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
        if not _is_number(self.alpha) or not 0 < self.alpha < float("inf"):
            raise InputError(f"alpha={self.alpha!r}; give a number above 0")
        _check_share("dropout", self.dropout)
        # Refuses options that it does not know, before a model is loaded.
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
        except (TypeError, ValueError) as error:  # an option that there is none of
            raise InputError(f"LoRA: {first_line(error)}") from error

    def targets(self, model: Any) -> str:
        """A regular expression of the modules to adapt."""
        return default_targets(model.config.to_dict())


@dataclass(frozen=True)
class LoraDecay(Lora):
    """LoRA with decoupled weight decay, which many structured methods only tie with.

    The default kept the target score and halved the divergence from the base model
    (benchmarks/LOG.md, 2026-11-22).
    """

    weight_decay: float = 30.0


@dataclass(frozen=True)
class LoraKl(Lora):
    """LoRA held to the base model on the prompts of its own training data: no replay."""

    kl: float = 1.0


@dataclass(frozen=True)
class LoraOwn(Lora):
    """LoRA held to the base model on text that the base model writes by itself."""

    kl: float = 1.0
    texts: int = N_TEXTS

    held_on_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("texts", self.texts, 1)

    @property
    def n_own(self) -> int:
        return self.texts


@dataclass(frozen=True)
class LoraLate(Lora):
    """LoRA on the later layers alone, those that SLIM adapts by default."""

    skip_first: float = SlimConfig.skip_first

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("skip_first", self.skip_first)

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
class Dora(Lora):
    """LoRA with the magnitude of each column apart; arXiv 2402.09353."""

    use_dora: ClassVar[bool] = True


@dataclass(frozen=True)
class Slim(Tuner):
    """Soft LoRA and identity mixture; NAACL 2025 (2025.naacl-long.246), our reconstruction.

    Attributes:
        texts: of the base model's own, which its distance tells the training data from; 0 for a
            distance to the training data alone, None for ``N_TEXTS``, or none where there are few
            tokens to learn.
        strength: ours, as of any tuner: on validation data it forgets less and costs nothing.
    """

    texts: int | None = None
    strength: float = 0.7

    preset: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts is not None:
            _check_count("texts", self.texts, 0)
        config = self.config(1, None, 0)  # refuses options that it does not know
        if self.texts == 0 and _compares(config):
            raise InputError(
                f"texts=0 and distance={config.distance!r}, which takes texts of the base model's "
                "own; give more texts, or another distance"
            )
        if self.texts and not _compares(config):
            raise InputError(
                f"texts={self.texts} and distance={config.distance!r}, which takes no text of the "
                "base model's own; leave texts out, or take distance=discriminant"
            )

    def config(self, rank: int, model: Any, seed: int) -> Any:
        distance = "whitened" if self.texts == 0 else "discriminant"
        options = {"alpha": 2.0 * rank, "distance": distance, "task_type": "CAUSAL_LM"}
        options |= {**self.preset, **self.extra}
        if options["distance"] == "discriminant" and "margin" not in options:
            options.setdefault("margin_inference", MARGIN_INFERENCE)
        try:
            return SlimConfig(r=rank, seed=seed, **options)
        except TypeError as error:  # an option that there is none of
            raise InputError(f"SLIM: {error}") from error

    def fitted_to(self, n_learnt: int) -> Slim:
        n_directions = min(SlimConfig.n_directions, max(FEWEST, n_learnt // TOKENS_A_DIRECTION))
        texts = self.texts
        asked = "distance" in self.extra
        if texts is None and not asked and n_directions < SlimConfig.n_directions:
            texts = 0  # next to few examples, other ones of the same task look strange
        extra = {"n_directions": n_directions, **self.extra}
        return dataclasses.replace(self, texts=texts, extra=extra)

    @property
    def n_own(self) -> int:
        if not _compares(self.config(1, None, 0)):
            return 0
        return N_TEXTS if self.texts is None else self.texts

    def prepare(
        self, adapted: Any, tokenizer: Any, rows: Sequence[Row], own: Sequence[Row]
    ) -> None:
        if own:
            fit_discriminant(adapted, tokenizer, rows, own)


@dataclass(frozen=True)
class Moe(Slim):
    """A top-2 mixture of LoRA experts with none of SLIM's parts, much like MixLoRA."""

    strength: float = 1.0

    preset: ClassVar[dict[str, Any]] = {
        "n_identity": 0,
        "clustering": False,
        "yielding": False,
        "merging": False,
        "l1": 0.0,
    }


@dataclass(frozen=True)
class SlimPaper(Slim):
    """SLIM in the plain reading of the paper, but for a standardised distance and our β.

    In all layers, and so with more parameters, as ``slim-all-layers``.
    """

    strength: float = 1.0

    is_ablation: ClassVar[bool] = True
    preset: ClassVar[dict[str, Any]] = {
        "distance": "max",
        "fit_on": "all",
        "skip_first": 0.0,
        "yield_at": "module",
        "margin": 0.0,
    }


def _variant(summary: str, **preset: Any) -> type[Slim]:
    """SLIM with some options set."""
    return type("SlimVariant", (Slim,), {"__doc__": summary, "is_ablation": True, "preset": preset})


SLIM_NO_IDENTITY = _variant(
    "SLIM without identity experts, so that nothing is there to yield to.",
    n_identity=0,
    yielding=False,
)
SLIM_NO_ROUTER = _variant("SLIM whose experts weigh the same but for yielding.", router=False)
SLIM_NO_CLUSTERING = _variant(
    "``slim-whitened`` with a single running mean; the discriminant has no centres at all.",
    distance="whitened",
    clustering=False,
)
SLIM_NO_YIELDING = _variant(
    "SLIM whose experts do not yield far from the training data.", yielding=False
)
SLIM_NO_MERGING = _variant("SLIM without random masks on B·A.", merging=False)
SLIM_NO_L1 = _variant("SLIM without its L1 penalty.", l1=0.0)
SLIM_WHITENED = _variant(
    "SLIM whose distance is that to the training data alone.", distance="whitened"
)
SLIM_MAX = _variant("SLIM with the paper's distance, the largest over channels.", distance="max")
SLIM_RMS = _variant("SLIM with the root mean square over channels as distance.", distance="rms")
SLIM_ALL_TOKENS = _variant(
    "SLIM whose statistics are those of all tokens, also of prompts.", fit_on="all"
)
SLIM_BY_MODULE = _variant(
    "SLIM each of whose modules yields by the distance of its own input.", yield_at="module"
)
SLIM_ALL_LAYERS = _variant(
    "SLIM in all layers, also in the first ones: at the same rank, and so with more parameters.",
    skip_first=0.0,
)
SLIM_MASK = _variant(
    "SLIM that keeps its last mask at inference in place of the expectation.",
    merge_inference="mask",
)


def _compares(config: SlimConfig) -> bool:
    """Whether the distance is fitted to texts of the base model's own as well."""
    return config.yielding and config.distance == "discriminant"


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r}; give a number of texts, at least {least}")


def _check_share(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise InputError(f"{name}={value!r}; give a share in [0, 1)")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_tuner(text: str) -> Tuner:
    """A tuner from its name, with options: ``slim`` or ``lora-wd:weight_decay=3``.

    Args:
        text: a name in ``TUNERS``; behind a colon, ``key=value`` joined by ``+``. Keys are the
            tuner's own fields, or those of its PEFT config.

    Raises:
        UnknownNameError: there is no such tuner.
        InputError: an option is malformed.
    """
    name, _, rest = text.partition(":")
    kind = TUNERS.get(name.strip())
    own = {one.name for one in dataclasses.fields(kind)} - {"extra"}
    options: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for item in filter(None, rest.split("+")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{text!r}: {item!r} is no option; write key=value")
        (options if key in own else extra)[key] = _value(value)
    return kind(**options, extra=extra)


def fit_rank(count: Callable[[int], int], n_wanted: int, tolerance: float = 0.05) -> int:
    """The rank whose number of trainable parameters is nearest to a given one.

    Args:
        count: rank → parameters, which grow by the same amount with each rank.
        n_wanted: parameters.
        tolerance: share by which they may differ.

    Raises:
        InputError: no rank comes as near.
    """
    first, second = count(1), count(2)
    step = second - first
    rank = max(1, round((n_wanted - first) / step) + 1)
    n_found = first + (rank - 1) * step
    if abs(n_found - n_wanted) > tolerance * n_wanted:
        raise InputError(
            f"no rank gives {n_wanted:,} trainable parameters within {tolerance:.0%}: rank {rank} "
            f"has {n_found:,}; choose another rank for the reference"
        )
    return rank


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
        return peft.get_peft_model(model, tuner.config(rank, model, seed))
    except BudwoodError:
        raise
    except (TypeError, ValueError) as error:  # PEFT on an option that it does not take
        raise InputError(f"cannot make the adapter: {error}") from error


def n_trainable(model: Any) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_at(tuner: Tuner, model: Any) -> Callable[[int], int]:
    """A function from rank to trainable parameters; it attaches, counts and detaches."""

    def count(rank: int) -> int:
        adapted = attach(tuner, model, rank, seed=0)
        try:
            return n_trainable(adapted)
        finally:
            adapted.unload()

    return count


def _value(text: str) -> Any:
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
