"""SmolVLM: as Idefics3."""

from __future__ import annotations

from typing import ClassVar

from budwood.prune.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """``SmolVLMForConditionalGeneration`` (SmolVLM and SmolVLM2).

    The frames of a video are single images to this model, and each is pruned by itself.
    """

    model_type: ClassVar[str] = "smolvlm"
