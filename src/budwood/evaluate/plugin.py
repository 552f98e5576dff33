"""The entry point ``lmms_eval.models``: ``lmms-eval --model budwood``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval ≥ 0.7.3 registers; it imports the model's class when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(
        model_id="budwood", chat_class_path="budwood.evaluate.lmms_eval.PrunedChat"
    )
