"""Sprout: the small demo model and its scenes, which ship with the package and need no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.sprout.model import load_vlm, vlm_directory
    from budwood.sprout.questions import KINDS, Question, ask, balanced
    from budwood.sprout.scenes import Scene, make_scene

_HOMES = {
    "load_vlm": "model",
    "vlm_directory": "model",
    "KINDS": "questions",
    "Question": "questions",
    "ask": "questions",
    "balanced": "questions",
    "Scene": "scenes",
    "make_scene": "scenes",
}
__all__ = [
    "KINDS",
    "Question",
    "Scene",
    "ask",
    "balanced",
    "load_vlm",
    "make_scene",
    "vlm_directory",
]


def __getattr__(name: str) -> Any:
    """Import on first use: drawing scenes needs no transformers."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
