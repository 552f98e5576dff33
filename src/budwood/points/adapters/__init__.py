"""Adapters behind one interface. A new adapter is a class and a line in ``ADAPTERS``."""

from __future__ import annotations

import os
from typing import Any

from budwood.errors import InputError
from budwood.points.adapters.base import (
    Adapter,
    AdapterConfig,
    check_fingerprint,
    fingerprint,
    read_adapter,
)
from budwood.points.encoders.base import PointEncoder
from budwood.registry import Registry

ADAPTERS = Registry(
    "adapter",
    {
        "frozen": "budwood.points.adapters.training_free:Frozen",
        "adabn": "budwood.points.adapters.training_free:AdaBN",
        "t3a": "budwood.points.adapters.training_free:T3A",
        "uni-adapter": "budwood.points.adapters.uni_adapter:UniAdapter",
        "point-cache": "budwood.points.adapters.point_cache:PointCache",
        "fca": "budwood.points.adapters.prompts:FusedCrossAttention",
        "fused": "budwood.points.adapters.prompts:Fused",
        "vpt-shallow": "budwood.points.adapters.prompts:ShallowPrompts",
        "vpt-deep": "budwood.points.adapters.prompts:DeepPrompts",
        "lora": "budwood.points.adapters.parameters:Lora",
        "tent": "budwood.points.adapters.parameters:Tent",
        "full": "budwood.points.adapters.parameters:FullFineTuning",
    },
)

__all__ = ["ADAPTERS", "Adapter", "AdapterConfig", "fingerprint", "load_adapter", "make_adapter"]


def make_adapter(name: str, encoder: PointEncoder, **options: Any) -> Adapter:
    """Make a fresh adapter for an encoder.

    Args:
        name: a name in ``ADAPTERS`` except ``"fused"``, which ``fuse()`` of an adapter makes.
        encoder: what to adapt.
        options: of the adapter's ``Config``.

    Raises:
        UnknownNameError: no such adapter.
        InputError: an unknown option, or a wrong value.
    """
    kind: type[Adapter] = ADAPTERS.get(name)
    if name == "fused":
        raise InputError("a fused adapter comes from fuse() of another one, such as 'fca'")
    device = next(encoder.parameters()).device
    return kind(encoder, kind.make_config(options)).to(device).eval()


def load_adapter(folder: str | os.PathLike[str], encoder: PointEncoder) -> Adapter:
    """Load what :meth:`Adapter.save` wrote.

    Args:
        folder: the adapter's folder.
        encoder: the encoder that the adapter was made for.

    Raises:
        InputError: there is no adapter, or it is truncated or of a newer version.
        UnsupportedModelError: it was made for another encoder.
        UnknownNameError: this version has no such adapter.
    """
    about, state = read_adapter(folder)
    check_fingerprint(about["encoder"], encoder, str(folder))
    kind: type[Adapter] = ADAPTERS.get(str(about.get("adapter")))
    try:
        adapter = kind.restore(encoder, about["config"], state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())  # torch spreads what does not fit over lines
        raise InputError(f"{folder} holds a damaged {kind.name!r} adapter: {reason}") from None
    return adapter.to(next(encoder.parameters()).device).eval()
