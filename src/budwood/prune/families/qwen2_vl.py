"""Qwen2-VL: full attention in every block, and a video as one run of placeholders."""

from __future__ import annotations

from typing import ClassVar

from budwood.prune.families.qwen import QwenVL


class Qwen2VL(QwenVL):
    """``Qwen2VLForConditionalGeneration``, images and videos."""

    model_type: ClassVar[str] = "qwen2_vl"
