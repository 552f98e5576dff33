"""Ways of fine-tuning by name: SLIM, its ablations, and the methods that it is compared with.

A new method is a line in ``METHODS``, options of SLIM or LoRA or a small class of its own, and its
summary in ``budwood.catalogue``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from budwood import catalogue
from budwood.errors import BudwoodError, InputError
from budwood.loading import third_party_warnings_off
from budwood.registry import Registry
from budwood.spec import parse_spec
from budwood.tune.methods.base import Tuner
from budwood.tune.methods.corda import Corda
from budwood.tune.methods.lora import (
    Dora,
    Lora,
    LoraAttention,
    LoraLate,
    LoraMasked,
    LoraSmall,
    LoraTexts,
)
from budwood.tune.methods.orthogonal import Oft, Osf
from budwood.tune.methods.slim import Slim


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
        "moe": _slim(n_identity=0, clustering=False, yielding=False, l1=0.0),
        "slim": _slim(),
        "slim-no-identity": _slim(n_identity=0, yielding=False),
        "slim-no-router": _slim(router=False),
        "slim-no-clustering": _slim(distance="whitened", clustering=False),
        "slim-no-yielding": _slim(yielding=False),
        "slim-merging": _slim(merging=True),
        "slim-answers": _slim(fit_on="supervised"),
        "slim-no-l1": _slim(l1=0.0),
        "slim-whitened": _slim(distance="whitened"),
        "slim-paper": _slim(
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
        "slim-mask": _slim(merging=True, merge_inference="mask"),
    },
)
"""Name → tuner and options. Summaries are in ``budwood.catalogue``."""

_REFUSALS = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError)


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
    names = chosen.kind.own_options()
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
    except _REFUSALS as error:  # PEFT on an option that it does not take
        raise InputError(f"cannot make the adapter: {error}") from error
