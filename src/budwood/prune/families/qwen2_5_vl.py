"""Qwen2.5-VL: images of any size, merged 2×2, shuffled into windows, with M-RoPE coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import InputError, UnsupportedModelError
from budwood.prune.families.base import Family, Layout, raster_boxes
from budwood.prune.saliency import PackedRecorder, Recorder


class Qwen25VL(Family):
    """``Qwen2_5_VLForConditionalGeneration``, images only: videos are not pruned.

    Saliency is the mean attention received in the last full-attention block, averaged over the
    patches of a merged token. This is budwood's choice: the tower has no [CLS].
    """

    model_type: ClassVar[str] = "qwen2_5_vl"
    encoder_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    video_inputs: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        self._deltas_before = model.model.rope_deltas
        config = model.config.vision_config
        full = [i for i in config.fullatt_block_indexes if 0 <= i < config.depth]
        if not full:
            raise UnsupportedModelError(
                f"fullatt_block_indexes={config.fullatt_block_indexes} names none of the "
                f"{config.depth} blocks; saliency is read from the last full-attention block"
            )
        self._block = max(full)

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        return PackedRecorder(self.model.model.visual.blocks[self._block].attn)

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        lengths = inputs["image_grid_thw"].prod(-1).tolist()
        return list(inputs["pixel_values"].split(lengths))

    def only(self, inputs: Mapping[str, Any], images: Sequence[int]) -> dict[str, Any]:
        pictures = self.pictures(inputs)
        return {
            "pixel_values": torch.cat([pictures[i] for i in images]),
            "image_grid_thw": inputs["image_grid_thw"][list(images)],
        }

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        config = self.model.config.vision_config
        window = config.window_size // config.spatial_merge_size // config.patch_size
        layouts: list[Layout] = []
        for frames, height, width in inputs["image_grid_thw"].tolist():
            if frames != 1:
                raise InputError(f"image_grid_thw has {frames} frames for an image; give 1")
            merged = config.spatial_merge_size
            layouts.append(_layout(height // merged, width // merged, window))
        return layouts

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        unit = self.model.config.vision_config.spatial_merge_size**2
        per_image = recorder.saliency([unit * layout.n_candidates for layout in layouts])
        return [
            layout.ordered(patches.view(-1, unit).mean(1))
            for patches, layout in zip(per_image, layouts, strict=True)
        ]

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor | None:
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None:  # then the model counts tokens along all three axes
            counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
            return counted.expand(3, -1, -1)
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=kinds.cpu(),
            image_grid_thw=inputs["image_grid_thw"].cpu(),
            attention_mask=mask,
        )
        return positions

    def placed(self, positions: Tensor, mask: Tensor) -> None:
        # As the model does itself: decoding by hand continues from count + delta.
        last = positions.amax((0, 2))
        self.model.model.rope_deltas = (last + 1 - mask.sum(-1)).unsqueeze(1)

    def release(self) -> None:
        self.model.model.rope_deltas = self._deltas_before


@lru_cache(maxsize=256)
def _layout(rows: int, columns: int, window: int) -> Layout:
    return Layout(
        n_placeholders=rows * columns,
        boxes=raster_boxes(rows, columns),
        grid=(rows, columns),
        order=window_order(rows, columns, window).argsort(),
    )


def window_order(rows: int, columns: int, window: int) -> Tensor:
    """List merged tokens window by window, row-major within and between windows.

    Args:
        rows: merged tokens along the height.
        columns: merged tokens along the width.
        window: side of a window in merged tokens; those at the right and bottom may be cut.

    Returns:
        Raster indices in windowed order, int64, shape (rows · columns,).
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    per_row = -(-columns // window)
    which = (y // window) * per_row + x // window
    return torch.argsort(which.flatten(), stable=True)
