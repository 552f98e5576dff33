"""Ways of fine-tuning by name: SLIM, its ablations, and the methods that it is compared with.

A new method is a line in ``METHODS``, options of SLIM or LoRA or a small class of its own, and its
summary in ``budwood.catalogue``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from budwood import catalogue
from budwood.checks import need_int
from budwood.errors import BudwoodError, InputError, UnsupportedModelError
from budwood.loading import third_party_warnings_off
from budwood.registry import Registry
from budwood.spec import parse_spec
from budwood.tune.config import PLENTY, SlimConfig
from budwood.tune.data.encoding import EncodedExample, tokens_before_request
from budwood.tune.methods.base import (
    Dora,
    Lora,
    LoraAttention,
    LoraLate,
    LoraMasked,
    LoraSmall,
    LoraTexts,
    Tuner,
)
from budwood.tune.methods.peers import Corda, Oft, Osf
from budwood.tune.slim.fitting import N_TEXTS, fit_discriminant

STRENGTH = 0.7
"""Adapter strength of SLIM after training on enough data."""
FEWER_TEXTS = 64
"""Self-generated texts beside few examples; they take half as long to write."""
_MANY = 10**6
"""Supervised tokens that a SLIM tuner counts on until it is fitted to the data."""


@dataclass(frozen=True)
class Slim(Tuner):
    """SLIM with the config of :meth:`SlimConfig.recommended`, and options set in ``extra``.

    Attributes:
        texts: self-generated texts that the discriminant tells the training data from. 0 for the
            whitened distance, None to decide by the amount of data.
        strength: ours, as of any tuner. None for 0.7, which on validation data forgets less and
            costs nothing, and for 1 with few examples.
        n_supervised_tokens: amount of training data, set by :meth:`fitted_to`.
    """

    texts: int | None = None
    strength: float | None = None  # type: ignore[assignment]
    n_supervised_tokens: int = _MANY

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

    def suited_to(self, tokenizer: Any) -> Slim:
        chosen = self.texts is not None or "distance" in self.extra
        if chosen or not (self._few and self.n_texts):
            return self
        try:
            tokens_before_request(tokenizer)
        except UnsupportedModelError as error:
            warnings.warn(
                f"SLIM takes the whitened distance, with which it learns less, since {error}",
                stacklevel=3,
            )
            return dataclasses.replace(self, texts=0)
        return self

    @property
    def n_texts(self) -> int:
        if not _needs_texts(self.config(1, None, 0)):
            return 0
        if self.texts is not None:
            return self.texts
        return FEWER_TEXTS if self._few else N_TEXTS

    @property
    def _few(self) -> bool:
        return self.n_supervised_tokens < PLENTY

    def training(self, texts: Sequence[EncodedExample]) -> dict[str, Any]:
        strength = self.strength
        if strength is None:
            strength = 1.0 if self._few else STRENGTH
        return super().training(texts) | {"strength": strength}

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
        "lora-mask": Method(LoraMasked),
        "lora-r10": Method(LoraSmall),
        "dora": Method(Dora),
        "oft": Method(Oft),
        "osf": Method(Osf),
        "corda": Method(Corda),
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
            merging=True,
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
            adapted = peft.get_peft_model(model, tuner.config(rank, model, seed))
            tuner.attached(adapted)
            return adapted
    except BudwoodError:
        raise
    except (TypeError, ValueError) as error:  # PEFT on an option that it does not take
        raise InputError(f"cannot make the adapter: {error}") from error


def _needs_texts(config: SlimConfig) -> bool:
    """Whether the distance is fitted to self-generated texts as well."""
    return config.yielding and config.distance == "discriminant"
