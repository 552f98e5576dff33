"""Model families, one file each. A new family is a new file and an entry in ``catalogue``.

The names are those of ``config.model_type``, with the vision tower's behind it where a tower makes
another family of it (``llava-pixtral``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from budwood import catalogue
from budwood.errors import UnknownNameError, UnsupportedModelError
from budwood.prune.families.base import Family, Layout
from budwood.registry import Registry
from budwood.unwrap import signature, wrapper_attribute

FAMILIES = Registry("model family", catalogue.FAMILIES)

_TOWERS = ("vision_tower", "visual", "vision_model")
"""What transformers calls the vision tower of a model's base model."""

__all__ = ["FAMILIES", "Family", "Layout", "as_built", "family_class", "family_of"]


def family_class(config: Any, name: str) -> type[Family]:
    """Look up the family of a model by its configuration, before any weights are read.

    Args:
        config: a transformers configuration.
        name: what messages call the model.

    Raises:
        UnsupportedModelError: the model has no vision, or no family knows it.
    """
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    if f"{config.model_type}-{tower}" in FAMILIES:
        return FAMILIES.get(f"{config.model_type}-{tower}")
    if config.model_type not in FAMILIES and not hasattr(config, "vision_config"):
        raise UnsupportedModelError(
            f"{name} ({config.model_type!r}) has no vision, so there are no visual tokens to "
            f"prune; known families: {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES.get(config.model_type)
    except UnknownNameError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None


def family_of(
    model: Any, processor: Any = None, whole_crops: bool = False, patches: str = "mean"
) -> Family:
    """Make the family of a model, ready to use.

    Args:
        model: a transformers model without wrappers; see :func:`budwood.unwrap.innermost`.
        processor: its processor, if at hand.
        whole_crops: give features as published LLaVA code has them; see :class:`Family`.
        patches: how patches that become one token make its saliency.

    Raises:
        UnsupportedModelError: no family knows it, or it lacks vision, a head, or a known tower, or
            it merges no patches.
        UnknownNameError: ``patches`` is none of ``PATCH_SCORES``.
    """
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        inner = wrapper_attribute(model)
        todo = f"pass its .{inner}" if inner else f"known families: {', '.join(FAMILIES)}"
        raise UnsupportedModelError(f"{kind} is not a transformers model; {todo}")
    family = family_class(config, kind)
    if whole_crops and not family.has_whole_crops:
        raise UnsupportedModelError(
            f"adav-official (compat='official') reproduces code for LLaVA models and cannot run on "
            f"{config.model_type!r}; choose another method"
        )
    if not hasattr(model, "generate") or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{kind} does not generate; give the family's ...ForConditionalGeneration model"
        )
    if "mm_encoder_outputs" not in signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{kind} takes no pre-encoded images (mm_encoder_outputs); update transformers to 5.20"
        )
    _check_patches(patches, family)
    _refuse_other_tower(model, kind)
    with as_built(kind):
        made = family(model, processor, whole_crops)
    for visuals in made.kinds:
        visuals.patches = patches
    return made


def _refuse_other_tower(model: Any, kind: str) -> None:
    """Refuse a vision tower of another kind than the configuration says."""
    for name in _TOWERS:
        tower = getattr(model.base_model, name, None)
        own = getattr(tower, "config", None)
        if own is not None and type(own) is not type(model.config.vision_config):
            raise UnsupportedModelError(
                f"{name} of {kind} is of kind {own.model_type!r}, and the configuration says "
                f"{model.config.vision_config.model_type!r}; put the model's own tower back"
            )


def _check_patches(patches: str, family: type[Family]) -> None:
    if patches not in catalogue.PATCH_SCORES:
        known = ", ".join(map(repr, catalogue.PATCH_SCORES))
        raise UnknownNameError(f"unknown patches {patches!r}; give one of {known}")
    if patches != "mean" and not family.merges_patches:
        raise UnsupportedModelError(
            f"patches={patches!r} is for models that merge patches into one token, such as Qwen's; "
            f"leave it out for {family.model_type!r}"
        )


@contextmanager
def as_built(name: str) -> Iterator[None]:
    """Say clearly that a part of a model is not where transformers puts it.

    Args:
        name: what the message calls the model.

    Raises:
        UnsupportedModelError: in place of the error that looking for it gave.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"{name} is not built as transformers builds it ({error}); give a model whose vision "
            "tower was not replaced, or choose a method without saliency (budwood ls methods)"
        ) from error
