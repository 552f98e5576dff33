"""What all Qwen-VL models share: pictures of any size, packed and merged 2×2, and M-RoPE."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from budwood.errors import InputError
from budwood.prune.families.base import Family, Layout
from budwood.prune.saliency import PackedRecorder, Recorder

_INPUTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
"""Packed patches, and the frames, rows and columns of patches of each image or video."""


class QwenVL(Family):
    """Images of a Qwen-VL model; ``videos`` is the same for its videos.

    Saliency is the mean attention received in a full-attention block, in which each frame attends
    to itself, averaged over the patches of a merged token. This is budwood's choice: the tower has
    no [CLS].

    Args:
        model: a transformers model for conditional generation.
        processor: its processor, if there is one at hand.
        whole_crops: not known to these models.
        kind: ``"image"`` or ``"video"``.
    """

    def __init__(
        self, model: Any, processor: Any = None, whole_crops: bool = False, kind: str = "image"
    ) -> None:
        super().__init__(model, processor, whole_crops)
        self.kind = kind
        self.encoder_inputs = self.pixels, self.grids = _INPUTS[kind]
        self.vision = model.config.vision_config
        self._deltas_before = model.model.rope_deltas
        if kind == "image":
            self.videos = type(self)(model, processor, kind="video")

    @property
    def block(self) -> int:
        """The block whose attention is read: the last with full attention."""
        return self.vision.depth - 1

    @abstractmethod
    def layout(self, frames: int, rows: int, columns: int) -> Layout:
        """Where the merged tokens of one image or video are."""

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        return PackedRecorder(self.model.model.visual.blocks[self.block].attn)

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return list(inputs[self.pixels].split(inputs[self.grids].prod(-1).tolist()))

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        merged = self.vision.spatial_merge_size
        layouts: list[Layout] = []
        for frames, height, width in inputs[self.grids].tolist():
            if self.kind == "image" and frames != 1:
                raise InputError(f"image_grid_thw has {frames} frames for an image; give 1")
            layouts.append(self.layout(frames, height // merged, width // merged))
        return layouts

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        unit = self.vision.spatial_merge_size**2
        lengths = [
            unit * layout.n_candidates // layout.frames
            for layout in layouts
            for _ in range(layout.frames)
        ]
        patches = torch.cat(recorder.saliency(lengths))
        merged = patches.view(-1, unit).mean(1)
        per_visual = merged.split([layout.n_candidates for layout in layouts])
        return [layout.ordered(scores) for scores, layout in zip(per_visual, layouts, strict=True)]

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor | None:
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None:
            raise InputError(
                "mm_token_type_ids is missing, and coordinates of visual tokens depend on it; pass "
                "all that the processor returns"
            )
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {
            name: torch.as_tensor(inputs[name]).cpu()
            for name in names
            if inputs.get(name) is not None
        }
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=kinds.cpu(), attention_mask=mask, **given
        )
        return positions

    def placed(self, positions: Tensor, mask: Tensor) -> None:
        # As the model does itself: decoding by hand continues from count + delta.
        last = positions.amax((0, 2))
        self.model.model.rope_deltas = (last + 1 - mask.sum(-1)).unsqueeze(1)

    def release(self) -> None:
        self.model.model.rope_deltas = self._deltas_before
