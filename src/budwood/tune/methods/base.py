"""What every way of fine-tuning has in common."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from budwood.checks import need_number
from budwood.errors import InputError, UnsupportedModelError, first_line
from budwood.progress import Progress, silent
from budwood.tune.data.encoding import EncodedExample
from budwood.tune.slim.architectures import default_targets
from budwood.tune.slim.fused_experts import is_fused
from budwood.tune.slim.targets import decoder_modules, is_linear

_GIVEN_ELSEWHERE = {
    "r": "--rank",
    "rank": "--rank",
    "lora_rank": "--rank",
    "oft_block_size": "--rank",
    "effective_rank": "--rank",
    "seed": "--seed",
    "lr": "--lr",
    "learning_rate": "--lr",
    "lora_alpha": "alpha (for LoRA and its kin a multiple of the rank)",
    "lora_dropout": "dropout",
}
"""Options that have another name or place here, and which."""
_NO_OPTIONS = ("extra", "n_supervised_tokens", "base", "slim_version")
"""Fields of tuners and of SLIM's config that budwood sets itself."""


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

    defaults: ClassVar[str] = ""
    """The day from which on the method has its default options, if it once had others."""
    kl_on_texts: ClassVar[bool] = False
    """Whether ``kl`` is taken on self-generated text, and not on prompts."""
    own_rank: ClassVar[int] = 0
    """The rank in a comparison; 0 for a rank with as many parameters as the reference has."""

    def __post_init__(self) -> None:
        for name, place in _GIVEN_ELSEWHERE.items():
            if name in self.extra:
                raise InputError(
                    f"{name}={self.extra[name]!r} is not an option of a method; give {place}"
                )
        weights = {"weight_decay": self.weight_decay, "kl": self.kl}
        need_number(lambda value: 0 <= value < math.inf, "number of at least 0", **weights)
        allowed = "number above 0 and up to 1"
        need_number(lambda value: 0 < value <= 1, allowed, strength=self.strength)

    @classmethod
    def own_options(cls) -> list[str]:
        """Names of the options that are not those of the adapter's config."""
        return [one.name for one in dataclasses.fields(cls) if one.name not in _NO_OPTIONS]

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
        progress: Progress = silent,
    ) -> None:
        """Prepare a fresh adapter for its first step.

        Args:
            adapted: the model with the adapter.
            tokenizer: of the model.
            rows: training data.
            texts: :attr:`n_texts` self-generated texts.
            progress: called after each batch that is read.
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


def linear_mlps(model: Any) -> str:
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


def peft_config(tuner: Tuner, kind: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Make a config of PEFT for a causal language model.

    Args:
        tuner: whose ``extra`` is what the user sets, which takes precedence.
        kind: the class of the config.
        name: of the method, for messages.
        options: what the method sets.

    Raises:
        InputError: there is no such option, or it does not take the value.
    """
    refuse_unknown(tuner, kind, name, tuner.extra)
    check_options(kind, name, tuner.extra)
    try:
        return kind(**{**options, "task_type": "CAUSAL_LM", **tuner.extra})
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {first_line(error)}") from error


def refuse_unknown(tuner: Tuner, kind: Any, name: str, options: Iterable[str]) -> None:
    """Refuse options that neither a tuner nor its config has.

    Args:
        tuner: of the method.
        kind: the class of the config.
        name: of the method, for messages.
        options: names.

    Raises:
        InputError: there is no such option; the message has those that there are.
    """
    fields = [one.name for one in dataclasses.fields(kind)]
    elsewhere = {*_GIVEN_ELSEWHERE, *_NO_OPTIONS, *_not_chosen()}
    known = [*tuner.own_options(), *(one for one in fields if one not in elsewhere)]
    for key in options:
        if key not in known and key not in fields:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            options_of = ", ".join(dict.fromkeys(known))
            raise InputError(f"{name} has no option {key!r}; {hint}known: {options_of}")


def _not_chosen() -> set[str]:
    """Fields of every config, which describe a saved adapter."""
    from peft import PeftConfig

    return {one.name for one in dataclasses.fields(PeftConfig)}


def check_options(kind: Any, name: str, options: Mapping[str, Any]) -> None:
    """Check options against the types of a config's fields, which PEFT does not look at.

    Args:
        kind: the class of the config.
        name: of the method, for messages.
        options: what the user sets.

    Raises:
        InputError: a value is of another type, or the option describes a saved adapter.
    """
    hints = get_type_hints(kind)
    not_chosen = _not_chosen()
    for key, value in options.items():
        if key in not_chosen:
            raise InputError(f"{name}: {key} is set by budwood; leave it out")
        if key in hints and not _takes(hints[key], value):
            allowed = inspect.formatannotation(hints[key]).replace("typing.", "")
            raise InputError(f"{name}: {key}={value!r}; it takes {allowed}")


def _takes(hint: Any, value: Any) -> bool:
    """Whether a value is of a type, as far down as a text can tell."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_takes(one, value) for one in get_args(hint))
    if origin is Literal:
        return any(type(one) is type(value) and one == value for one in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, origin or hint)
