"""A plugin for vLLM: images are pruned by the question before the language model sees them.

vLLM finds it by itself. It adds architectures of new names, so that installing it changes nothing;
``budwood serve MODEL --keep 0.1`` writes the line that asks for one.
"""

from __future__ import annotations

from budwood import catalogue

KEY = "budwood"
"""Where a model's configuration has the settings: ``{"budwood": {"keep": 64}}``."""


def register() -> None:
    """Register the architectures. vLLM calls this in each of its processes; twice is safe.

    What is behind a name is imported when a model asks for it.
    """
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    known = ModelRegistry.get_supported_archs()
    for entry in catalogue.SERVED.values():
        assert entry.target is not None
        name = served_name(entry.facts["architecture"])
        if name not in known:
            ModelRegistry.register_model(name, entry.target)


def served_name(architecture: str) -> str:
    """The name of the pruning architecture for one of transformers' architectures."""
    return f"Budwood{architecture}"
