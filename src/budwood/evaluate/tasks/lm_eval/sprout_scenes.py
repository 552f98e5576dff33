"""What ``sprout_scenes.yaml`` calls."""

from __future__ import annotations

from typing import Any

from budwood.evaluate.scenes import picture, scene_questions, score

_OPTIONS = ("n_scenes", "split", "scene_seed", "high_resolution")


def dataset(**given: Any) -> dict[str, Any]:
    """The questions; lm-eval also passes on the arguments of the model, which are ignored."""
    options = {name: value for name, value in given.items() if name in _OPTIONS}
    return {"test": scene_questions(**options)}


def doc_to_image(doc: dict[str, Any]) -> list[Any]:
    """The picture of a question."""
    return [picture(doc)]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is right."""
    return score(doc, results[0])
