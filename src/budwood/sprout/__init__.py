"""Sprout: the small demo model and its scenes, which ship with the package and need no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.sprout.model import load_vlm as load_vlm
    from budwood.sprout.model import vlm_directory as vlm_directory
    from budwood.sprout.questions import KINDS as KINDS
    from budwood.sprout.questions import Question as Question
    from budwood.sprout.questions import ask as ask
    from budwood.sprout.questions import balanced as balanced
    from budwood.sprout.questions import example as example
    from budwood.sprout.scenes import Scene as Scene
    from budwood.sprout.scenes import make_scene as make_scene

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "KINDS": "questions",
        "Question": "questions",
        "Scene": "scenes",
        "ask": "questions",
        "balanced": "questions",
        "example": "questions",
        "load_vlm": "model",
        "make_scene": "scenes",
        "vlm_directory": "model",
    },
)
