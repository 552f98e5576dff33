"""Model families, one file each. A new family is a new file and an entry in ``catalogue``.

The names are those of ``config.model_type``.
"""

from __future__ import annotations

import inspect
from typing import Any

from budwood import catalogue
from budwood.errors import UnknownNameError, UnsupportedModelError
from budwood.prune.families.base import Family, Layout
from budwood.registry import Registry

FAMILIES = Registry("model family", catalogue.FAMILIES)

__all__ = ["FAMILIES", "Family", "Layout", "family_of", "innermost"]


def innermost(model: Any) -> Any:
    """The transformers model behind wrappers: PEFT's methods end up in it."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def family_of(model: Any, processor: Any = None, compat: str | None = None) -> Family:
    """The family of a model, ready to use.

    Args:
        model: a transformers model, without wrappers; see :func:`innermost`.
        processor: its processor, if at hand.
        compat: None, or ``"official"``.

    Raises:
        UnsupportedModelError: no family knows it, or it lacks vision, a head, or a known tower.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    known = ", ".join(FAMILIES.names())
    if model_type is None:
        raise UnsupportedModelError(f"{kind} is no transformers model; known families: {known}")
    if model_type not in FAMILIES and not hasattr(config, "vision_config"):
        raise UnsupportedModelError(
            f"{kind} ({model_type!r}) has no vision, so there are no visual tokens to prune; "
            f"known families: {known}"
        )
    try:
        family = FAMILIES.get(model_type)
    except UnknownNameError as error:
        raise UnsupportedModelError(f"{kind}: {error}") from None
    if not hasattr(model, "generate") or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{kind} does not generate; give the family's ...ForConditionalGeneration model"
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{kind} takes no pre-encoded images (mm_encoder_outputs); update transformers to 5.20"
        )
    return family(model, processor, compat)
