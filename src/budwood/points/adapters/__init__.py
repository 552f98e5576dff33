"""Adapters, behind one interface. A new one is a new class and a line here."""

from __future__ import annotations

import os
from typing import Any

from budwood.errors import InputError
from budwood.points.adapters.base import (
    Adapter,
    AdapterConfig,
    check_identity,
    identity,
    read_adapter,
)
from budwood.points.encoders.base import PointEncoder
from budwood.registry import Registry

ADAPTERS = Registry(
    "adapter",
    {
        "frozen": "budwood.points.adapters.adabn:Frozen",
        "adabn": "budwood.points.adapters.adabn:AdaBN",
        "t3a": "budwood.points.adapters.t3a:T3A",
        "fca": "budwood.points.adapters.fca:FusedCrossAttention",
        "fused": "budwood.points.adapters.fca:Fused",
        "vpt-shallow": "budwood.points.adapters.vpt:ShallowPrompts",
        "vpt-deep": "budwood.points.adapters.vpt:DeepPrompts",
        "lora": "budwood.points.adapters.weights:Lora",
        "tent": "budwood.points.adapters.weights:Tent",
        "full": "budwood.points.adapters.weights:FullFineTuning",
    },
)

__all__ = ["ADAPTERS", "Adapter", "AdapterConfig", "identity", "load_adapter", "make_adapter"]


def make_adapter(name: str, encoder: PointEncoder, **options: Any) -> Adapter:
    """A fresh adapter for an encoder.

    Args:
        name: a name in ``ADAPTERS``, but not ``"fused"``, which an adapter's ``fuse()`` makes.
        encoder: what to adapt.
        options: of its ``Config``.

    Raises:
        UnknownNameError: no such adapter.
        InputError: an option that it does not have, or of a wrong value.
    """
    kind: type[Adapter] = ADAPTERS.get(name)
    if name == "fused":
        raise InputError("a fused adapter comes from fuse() of another one, such as 'fca'")
    device = next(encoder.parameters()).device
    return kind(encoder, kind.make_config(options)).to(device).eval()


def load_adapter(folder: str | os.PathLike[str], encoder: PointEncoder) -> Adapter:
    """An adapter that :meth:`Adapter.save` wrote, for the encoder that it was made for.

    Raises:
        InputError: there is none, it is truncated, or of a newer version.
        UnsupportedModelError: it was made for another encoder.
        UnknownNameError: this version has no such adapter.
    """
    about, state = read_adapter(folder)
    check_identity(about["encoder"], encoder, str(folder))
    kind: type[Adapter] = ADAPTERS.get(str(about.get("adapter")))
    try:
        adapter = kind.restore(encoder, about["config"], state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())  # torch lists what does not fit on lines of its own
        raise InputError(f"{folder} holds a damaged {kind.name!r} adapter: {told}") from None
    return adapter.to(next(encoder.parameters()).device).eval()
