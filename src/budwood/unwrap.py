"""The transformers model behind what users pass as a model."""

from __future__ import annotations

from typing import Any


def innermost(model: Any) -> Any:
    """Return the transformers model behind PEFT's and ``torch.compile``'s wrappers."""
    compiled = getattr(model, "_orig_mod", None)
    if compiled is not None:
        return innermost(compiled)
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    return inner if inner is model else innermost(inner)


def wrapper_attribute(model: Any) -> str | None:
    """Name the attribute of a pipeline or a parallel wrapper that holds the transformers model.

    Returns:
        ``"model"`` or ``"module"``; None for anything else.
    """
    for name in ("module", "model"):
        if hasattr(getattr(getattr(model, name, None), "config", None), "model_type"):
            return name
    return None


def compiled_around(root: Any, module: Any) -> str | None:
    """Name a compiled module below ``root`` that contains ``module``; None if there is none.

    Hooks inside a compiled module do not run.
    """
    for name, outer in root.named_modules():
        compiled = hasattr(outer, "_orig_mod") or getattr(outer, "_compiled_call_impl", None)
        if name and compiled and any(inner is module for inner in outer.modules()):
            return name
    return None
