"""The transformers model behind what users pass as a model."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary


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
    # Down to the module and no further: a large model has thousands of them.
    waiting: list[tuple[str, Any, str | None]] = [("", root, None)]
    while waiting:
        name, outer, within = waiting.pop()
        compiled = "_orig_mod" in outer._modules or vars(outer).get("_compiled_call_impl")
        within = name if name and compiled and within is None else within
        if outer is module:
            return within
        for child, inner in reversed(outer._modules.items()):
            if inner is not None:
                waiting.append((f"{name}.{child}" if name else child, inner, within))
    return None


_SIGNATURES: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()


def signature(method: Any) -> inspect.Signature:
    """``inspect.signature`` of a bound method or function, computed once."""
    function = getattr(method, "__func__", None)
    if function is None:
        return inspect.signature(method)
    if function not in _SIGNATURES:
        _SIGNATURES[function] = inspect.signature(method)
    return _SIGNATURES[function]
