"""Whether pruning is attached to a model already, before its LLM or inside it."""

from __future__ import annotations

from typing import Any

from budwood.errors import AttachError


def refuse_attached(model: Any) -> None:
    """Refuse a model that prunes already: a second session would see what the first one left.

    Args:
        model: a transformers model.

    Raises:
        AttachError: :func:`budwood.prune.attach` or ``attach_inside`` holds it.
    """
    name = type(model).__name__
    held = getattr(getattr(model, "__dict__", {}).get("generate"), "budwood_session", None)
    if held is not None:
        raise AttachError(
            f"{name} is already attached to (method {held.pruner.method.name!r}, "
            f"keep={held.pruner.budgets.keep}); detach that session first"
        )
    hooks = getattr(model, "_forward_pre_hooks", {}).values()
    if any(getattr(hook, "prunes_inside", False) for hook in hooks):
        raise AttachError(f"{name} prunes inside already; detach that session first")
