"""Qwen3-VL: features on several levels (deepstack), and timestamps between frames of a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from budwood.prune.families.base import Layout
from budwood.prune.families.qwen import QwenVL, frames_layout


class Qwen3VL(QwenVL):
    """``Qwen3VLForConditionalGeneration``, images and videos.

    The LLM adds a feature of a deeper level to each visual token after each of its first layers.
    These are dropped along with the token. Tokens are chosen by the input embeddings.
    """

    model_type: ClassVar[str] = "qwen3_vl"

    def features(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        output = self.encode(inputs)
        levels = (output.pooler_output, *output.deepstack_features)
        return [torch.stack(visual, dim=1) for visual in zip(*levels, strict=True)]

    def outputs(self, features: Sequence[Tensor]) -> Any:
        first, *deeper = zip(*(visual.unbind(1) for visual in features), strict=True)
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=first,  # pyright: ignore[reportArgumentType]
            deepstack_features=deeper,  # pyright: ignore[reportArgumentType]
        )

    def extent(self, row: Tensor, start: int, stop: int) -> tuple[int, int]:
        """With the first timestamp, if the whole video is wrapped as each of its frames is."""
        opens = int(self.model.config.vision_start_token_id)
        before = row[: start - 1].tolist()  # less the token that opens the first frame
        marks = [i for i, token in enumerate(before) if token in self.wrapping_ids]
        return (marks[-1], stop) if marks and before[marks[-1]] == opens else (start, stop)

    def layout(self, frames: int, rows: int, columns: int) -> Layout:
        return frames_layout(frames, rows, columns, one_run=False)


class Qwen3VLMoe(Qwen3VL):
    """``Qwen3VLMoeForConditionalGeneration``, images and videos."""

    model_type: ClassVar[str] = "qwen3_vl_moe"
