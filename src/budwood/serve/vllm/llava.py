"""LLaVA, LLaVA-NeXT and LLaVA-OneVision in vLLM."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from budwood.prune.families.base import Layout
from budwood.prune.families.llava import candidates_of
from budwood.serve.vllm.encoders import FusedRecorder, last_layer
from budwood.serve.vllm.layouts import (
    has_cls,
    llava_layout,
    llava_next_layout,
    onevision_layout,
    scores_of_crops,
)
from budwood.serve.vllm.modeling import PrunesImages
from budwood.serve.vllm.processing import PruningProcessor, UnprunedBudget

_TOWER = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."
    }
)
"""transformers 5.23 saves a tower without the ``vision_model.`` that vLLM expects."""


class LlavaInfo(UnprunedBudget, LlavaProcessingInfo):
    """Encoding costs all patches."""


class LlavaNextInfo(UnprunedBudget, LlavaNextProcessingInfo):
    """Encoding costs all patches of all crops."""


class OnevisionInfo(UnprunedBudget, LlavaOnevisionProcessingInfo):
    """Encoding costs all patches of all crops, and a video all of its frames."""

    def video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        return self.get_max_video_tokens(seq_len, mm_counts)


class LlavaProcessor(PruningProcessor, LlavaMultiModalProcessor):
    """Fewer placeholders an image."""

    layout = staticmethod(llava_layout)


class LlavaNextProcessor(PruningProcessor, LlavaNextMultiModalProcessor):
    """Fewer placeholders an image; newlines stay."""

    layout = staticmethod(llava_next_layout)


class OnevisionProcessor(PruningProcessor, LlavaOnevisionMultiModalProcessor):
    """Fewer placeholders an image; newlines stay."""

    layout = staticmethod(onevision_layout)


class _PrunesCrops(PrunesImages):
    """A CLIP or SigLIP tower that sees crops."""

    def recorder(self) -> FusedRecorder:
        tower = self.vision_tower.vision_model
        index, depth = self.config.vision_feature_layer, self.config.vision_config.num_hidden_layers
        layer = last_layer(tower.encoder.layers, index, depth)
        return FusedRecorder(layer.self_attn, has_cls(self.config))


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=LlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class BudwoodLlava(_PrunesCrops, LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` with pruned images."""

    layout = staticmethod(llava_layout)
    hf_to_vllm_mapper: ClassVar[Any] = LlavaForConditionalGeneration.hf_to_vllm_mapper | _TOWER

    def saliency(
        self, recorder: FusedRecorder, inputs: Mapping[str, Any], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        return candidates_of(recorder.saliency(), layouts)


class _PrunesRasters(_PrunesCrops):
    """Several crops an image, of which the language model gets an overview and a raster."""

    per_image = ("image_sizes",)

    def saliency(
        self, recorder: FusedRecorder, inputs: Mapping[str, Any], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        # A batch of the processor pads images to as many crops as the largest has.
        n_crops = [len(crops) for crops in inputs["pixel_values"]]
        return scores_of_crops(recorder.saliency(), n_crops, layouts)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class BudwoodLlavaNext(_PrunesRasters, LlavaNextForConditionalGeneration):
    """``LlavaNextForConditionalGeneration`` with pruned images."""

    layout = staticmethod(llava_next_layout)
    hf_to_vllm_mapper: ClassVar[Any] = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | _TOWER


@MULTIMODAL_REGISTRY.register_processor(
    OnevisionProcessor, info=OnevisionInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class BudwoodLlavaOnevision(_PrunesRasters, LlavaOnevisionForConditionalGeneration):
    """``LlavaOnevisionForConditionalGeneration`` with pruned images. Videos go through whole."""

    layout = staticmethod(onevision_layout)
    hf_to_vllm_mapper: ClassVar[Any] = (
        LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | _TOWER
    )
