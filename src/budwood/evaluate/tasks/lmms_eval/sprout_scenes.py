"""What ``sprout_scenes.yaml`` calls."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask  # pyright: ignore[reportMissingImports]

from budwood.evaluate.scenes import picture, scene_questions, score


class SproutScenes(ConfigurableMessagesTask):
    """A task whose questions are drawn in place of being downloaded.

    Args:
        config: of the YAML file.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: config[name] for name in config if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Draw the questions.

        Args:
            dataset_kwargs: options of ``budwood.evaluate.scene_questions``.
        """
        self.dataset = DatasetDict({"test": scene_questions(**(dataset_kwargs or {}))})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The picture of a question."""
    return [picture(doc)]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question itself."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is right."""
    return score(doc, results[0])
