"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM.

These models place tokens by rows and columns (M-RoPE). vLLM computes positions when a request
arrives, long before tokens are chosen. So the text is placed as if no token were dropped, the
tokens of an image all get the place of its corner, and each kept token brings its row and column
along: as columns behind its features, which are taken off and added to the positions before the
model runs.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from budwood.errors import UnsupportedModelError
from budwood.prune.families.base import Layout
from budwood.prune.families.qwen import ordered_units
from budwood.serve.vllm.encoders import RotatedRecorder
from budwood.serve.vllm.layouts import qwen25_layout, qwen_layout
from budwood.serve.vllm.modeling import PrunesImages
from budwood.serve.vllm.processing import PLACEHOLDERS, PruningProcessor

_DIGIT = 128
"""Rows and columns are two digits each: bfloat16 has all whole numbers up to 256, and no more."""
_N_COLUMNS = 4


class Qwen2VLProcessor(PruningProcessor, Qwen2VLMultiModalProcessor):
    """Fewer placeholders an image."""

    layout = staticmethod(qwen_layout)


class Qwen25VLProcessor(PruningProcessor, Qwen2_5_VLMultiModalProcessor):
    """Fewer placeholders an image."""

    layout = staticmethod(qwen25_layout)


class Qwen3VLProcessor(PruningProcessor, Qwen3VLMultiModalProcessor):
    """Fewer placeholders an image."""

    layout = staticmethod(qwen_layout)


class _PrunesGrids(PrunesImages):
    """Packed images, each merged into a grid of tokens. Videos go through whole."""

    per_image = ("image_grid_thw",)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        length = 1 + max(vllm_config.scheduler_config.max_num_batched_tokens, *captured)
        # Fixed places in memory, as a captured graph needs them.
        for name in ("_offsets", "_positions"):
            self.register_buffer(name, torch.zeros(3, length, dtype=torch.long), persistent=False)

    def _refuse(self, vllm_config: Any) -> None:
        super()._refuse(vllm_config)
        n_stages = vllm_config.parallel_config.pipeline_parallel_size
        if n_stages > 1:
            raise UnsupportedModelError(
                f"pipeline_parallel_size={n_stages}: later stages do not see where this model's "
                "kept tokens are; use --tensor-parallel-size or --data-parallel-size"
            )
        if vllm_config.speculative_config is not None:
            raise UnsupportedModelError(
                "a drafting model does not see where this model's kept tokens are; leave "
                "--speculative-config out"
            )
        if vllm_config.model_config.get_multimodal_config().video_pruning_rate:
            raise UnsupportedModelError(
                "video_pruning_rate moves positions as well; leave --video-pruning-rate out"
            )

    # Choosing

    def recorder(self) -> RotatedRecorder:
        """Hooks on the last block with full attention."""
        vision = self.config.vision_config
        blocks = getattr(vision, "fullatt_block_indexes", None) or [vision.depth - 1]
        return RotatedRecorder(self.visual.blocks[max(i for i in blocks if i < vision.depth)].attn)

    def saliency(
        self, recorder: RotatedRecorder, inputs: Mapping[str, Any], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        unit = self.config.vision_config.spatial_merge_size**2
        scores = recorder.saliency([unit * layout.n_candidates for layout in layouts])
        return ordered_units(torch.cat(scores).view(-1, unit).mean(1), layouts)

    def some(
        self, inputs: Mapping[str, Any], layouts: Sequence[Layout], which: slice
    ) -> dict[str, Any]:
        unit = self.config.vision_config.spatial_merge_size**2
        ends = [0]
        for layout in layouts:
            ends.append(ends[-1] + unit * layout.n_candidates)
        start, stop = ends[which.start], ends[which.stop]
        return {
            name: value[start:stop] if name == "pixel_values" else value[which]
            for name, value in inputs.items()
        }

    # Positions

    def marked(self, features: Tensor, layout: Layout, kept: Tensor | None) -> Tensor:
        """Features with the row and column of each token behind them."""
        if kept is None:
            return torch.cat((features, features.new_zeros(len(features), _N_COLUMNS)), dim=1)
        assert layout.grid is not None
        n_columns = layout.grid[1]
        places = torch.stack((kept // n_columns, kept % n_columns), dim=1)
        digits = torch.stack((places // _DIGIT, places % _DIGIT), dim=2).flatten(1)
        return torch.cat((features, digits.to(features.dtype)), dim=1)

    def whole(self, embeddings: Any, kwargs: Mapping[str, Any]) -> Any:
        """Videos and encoded images: vLLM's positions are theirs already."""
        return [self.marked(one, None, None) for one in embeddings or ()]  # type: ignore[arg-type]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        given = multimodal_embeddings
        self._offsets[:, : len(input_ids)].zero_()
        if given is None or len(given) == 0:
            return super().embed_input_ids(input_ids, given, is_multimodal=is_multimodal)
        assert is_multimodal is not None
        digits = torch.cat([one[:, -_N_COLUMNS:] for one in given]).long().unflatten(1, (2, 2))
        places = (digits[..., 0] * _DIGIT + digits[..., 1]).T.contiguous()
        mask = is_multimodal.to(places.device, non_blocking=True).expand(2, -1)
        self._offsets[1:, : len(input_ids)].masked_scatter_(mask, places)
        features = [one[:, :-_N_COLUMNS] for one in given]
        return super().embed_input_ids(input_ids, features, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        n_tokens = positions.shape[-1]
        if positions.ndim == 2:
            offsets = self._offsets[:, :n_tokens]
            positions = torch.add(positions, offsets, out=self._positions[:, :n_tokens])
            offsets.zero_()  # a step without images must find none
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Positions as if no token were dropped, those of an image all at its corner."""
        whole, longer, pieces = list(input_tokens), [], []
        n_more, done = 0, 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            place = feature.mm_position
            start = place.offset + n_more
            image = feature.data
            n_whole = place.length
            if image is not None and PLACEHOLDERS in image:
                n_whole = type(self).layout(self.config, image.get_data()).n_placeholders
                token = input_tokens[place.offset]
                whole[start : start + place.length] = [token] * n_whole
                pieces.append((done, start, place.length))
                done = start + n_whole
            longer.append(
                replace(feature, mm_position=replace(place, offset=start, length=n_whole))
            )
            n_more += n_whole - place.length
        positions, delta = super().get_mrope_input_positions(whole, longer)
        kept = []
        for begin, start, length in pieces:
            kept += [positions[:, begin:start], positions[:, start : start + 1].expand(-1, length)]
        return torch.cat((*kept, positions[:, done:]), dim=1), delta + n_more


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class BudwoodQwen2VL(_PrunesGrids, Qwen2VLForConditionalGeneration):
    """``Qwen2VLForConditionalGeneration`` with pruned images."""

    layout = staticmethod(qwen_layout)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class BudwoodQwen25VL(_PrunesGrids, Qwen2_5_VLForConditionalGeneration):
    """``Qwen2_5_VLForConditionalGeneration`` with pruned images."""

    layout = staticmethod(qwen25_layout)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class BudwoodQwen3VL(_PrunesGrids, Qwen3VLForConditionalGeneration):
    """``Qwen3VLForConditionalGeneration`` with pruned images, deepstack features in step."""

    layout = staticmethod(qwen_layout)
