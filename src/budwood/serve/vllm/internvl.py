"""InternVL in vLLM, in transformers' format."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from budwood.prune.families.base import Layout
from budwood.prune.saliency import ClsRecorder
from budwood.serve.vllm.layouts import internvl_layout, scores_of_crops
from budwood.serve.vllm.modeling import PrunesImages
from budwood.serve.vllm.processing import PruningProcessor, UnprunedBudget


class InternVLInfo(UnprunedBudget, InternS1ProcessingInfo):
    """Encoding costs all tiles, and a video all of its frames."""

    def get_max_image_tokens(self) -> int:
        # vLLM counts one tile where files leave it to the processor to cut, as those of InternVL3.
        processor = self.get_hf_processor()
        return (processor.image_processor.max_patches + 1) * processor.image_seq_length

    def video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        n_frames = self.get_num_frames_with_most_features(seq_len, mm_counts)
        return n_frames * self.get_hf_processor().image_seq_length


class InternVLProcessor(PruningProcessor, InternS1MultiModalProcessor):
    """Fewer placeholders an image, between the same markers."""

    layout = staticmethod(internvl_layout)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=InternVLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class BudwoodInternVL(PrunesImages, InternS1ForConditionalGeneration):
    """``InternVLForConditionalGeneration`` with pruned images. Videos go through whole."""

    layout = staticmethod(internvl_layout)
    per_image = ("image_num_patches",)

    def recorder(self) -> ClsRecorder:
        # The encoder's attention is not split: each rank has all heads.
        attention = self.vision_tower.encoder.layer[-1].attention
        normed = ("q_norm", "k_norm") if attention.qk_normalization else ("q_proj", "k_proj")
        return ClsRecorder(attention, *normed)

    def saliency(
        self, recorder: ClsRecorder, inputs: Mapping[str, Any], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        n_crops = [layout.n_crops for layout in layouts]
        return scores_of_crops(recorder.saliency(), n_crops, layouts)

    def some(
        self, inputs: Mapping[str, Any], layouts: Sequence[Layout], which: slice
    ) -> dict[str, Any]:
        ends = [0, *accumulate(layout.n_crops for layout in layouts)]
        return {
            **inputs,
            "pixel_values": inputs["pixel_values"][ends[which.start] : ends[which.stop]],
            "image_num_patches": inputs["image_num_patches"][which],
        }
