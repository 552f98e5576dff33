"""Evaluate pruned models with lm-eval and lmms-eval, on their benchmarks or on sprout scenes.

Nothing here is imported by ``import budwood``; see docs/evaluate.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.evaluate.pruned import PrunedModel as PrunedModel
    from budwood.evaluate.pruned import load_pruned as load_pruned
    from budwood.evaluate.scenes import picture as picture
    from budwood.evaluate.scenes import scene_questions as scene_questions
    from budwood.evaluate.scenes import task_folder as task_folder

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "PrunedModel": "pruned",
        "load_pruned": "pruned",
        "picture": "scenes",
        "scene_questions": "scenes",
        "task_folder": "scenes",
    },
)
