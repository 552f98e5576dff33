"""Qwen2.5-VL: as Qwen2-VL, with a tower that shuffles merged patches into windows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import UnsupportedModelError
from budwood.prune.families.base import Layout
from budwood.prune.families.qwen import QwenVL, frames_layout


class Qwen25VL(QwenVL):
    """``Qwen2_5_VLForConditionalGeneration``, images and videos."""

    model_type: ClassVar[str] = "qwen2_5_vl"

    def __init__(
        self, model: Any, processor: Any = None, whole_crops: bool = False, kind: str = "image"
    ) -> None:
        super().__init__(model, processor, whole_crops, kind)
        if not self._full_blocks:
            raise UnsupportedModelError(
                f"fullatt_block_indexes={self.vision.fullatt_block_indexes} names none of the "
                f"{self.vision.depth} blocks; saliency is read from the last full-attention block"
            )

    @property
    def _full_blocks(self) -> list[int]:
        return [i for i in self.vision.fullatt_block_indexes if 0 <= i < self.vision.depth]

    @property
    def block(self) -> int:
        return max(self._full_blocks)

    def layout(self, frames: int, rows: int, columns: int) -> Layout:
        return windowed_layout(frames, rows, columns, self.vision)


def windowed_layout(frames: int, rows: int, columns: int, vision: Any) -> Layout:
    """Frames whose merged tokens the encoder has window by window.

    Args:
        frames: 1 for an image.
        rows: merged tokens along the height.
        columns: merged tokens along the width.
        vision: the vision tower's configuration.
    """
    window = vision.window_size // vision.spatial_merge_size // vision.patch_size
    return frames_layout(frames, rows, columns, _place_in_windows(rows, columns, window))


@lru_cache(maxsize=256)
def _place_in_windows(rows: int, columns: int, window: int) -> tuple[int, ...]:
    return tuple(window_order(rows, columns, window).argsort().tolist())


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
