"""LLaVA-NeXT: an overview and several crops per image, unpadded, with a newline after each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from budwood.errors import UnsupportedModelError
from budwood.prune.families.base import Layout, Placing, raster_boxes, tile_boxes, unmoved
from budwood.prune.families.llava import Llava
from budwood.prune.saliency import OutputRecorder


class LlavaNext(Llava):
    """``LlavaNextForConditionalGeneration``.

    With ``whole_crops`` the features are those of the published code: all crops one after the
    other, neither unpadded nor with newlines.
    """

    model_type: ClassVar[str] = "llava_next"

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        if self.tower.drops_first({}) != self.tower.has_cls:
            wanted = "default" if self.tower.has_cls else "full"
            raise UnsupportedModelError(
                f"vision_feature_select_strategy="
                f"{model.config.vision_feature_select_strategy!r} leaves no square of patches of "
                f"tower {self.tower.config.model_type!r}; set it to {wanted!r}"
            )

    def features(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        if not self.whole_crops:
            return super().features(inputs)
        crops = OutputRecorder(self.model.model.multi_modal_projector)
        with crops:
            packed = super().features(inputs)
        per_image = [layout.n_crops for layout in self.layouts(inputs, packed)]
        return [image.flatten(0, 1) for image in crops.output().split(per_image)]

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return [crops[0] for crops in inputs["pixel_values"]]  # the overview; padding may differ

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        config = self.model.config
        pinpoints = tuple(tuple(pinpoint) for pinpoint in config.image_grid_pinpoints)
        build = crop_layout if self.whole_crops else anyres_layout
        crop = config.vision_config.image_size
        return [
            build((height, width), pinpoints, crop, self.tower.side)
            for height, width in torch.as_tensor(inputs["image_sizes"]).tolist()
        ]

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        per_image = recorder.saliency().split([layout.n_crops for layout in layouts])
        return [
            layout.ordered(crops.flatten())
            for crops, layout in zip(per_image, layouts, strict=True)
        ]

    def keys(self, recorder: Any, layouts: Sequence[Layout]) -> Sequence[Tensor | None]:
        per_image = recorder.keys().split([layout.n_crops for layout in layouts])
        return [
            layout.ordered(crops.flatten(0, 1))
            for crops, layout in zip(per_image, layouts, strict=True)
        ]

    def placing(self, layout: Layout) -> Placing:
        """In the whole picture: the boxes of a layout already leave its padding out."""
        return partial(unmoved, layout.boxes)


@lru_cache(maxsize=256)
def anyres_layout(
    image_size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], crop: int, side: int
) -> Layout:
    """Build the model's own layout: the overview, then the unpadded raster with newlines.

    Args:
        image_size: height and width of the picture in pixels.
        pinpoints: heights and widths that pictures are fitted into, in pixels.
        crop: side of one crop in pixels.
        side: patches along a side of one crop.
    """
    whole = crop_layout(image_size, pinpoints, crop, side)
    rows, columns = _grid(image_size, pinpoints, crop)
    per_crop = side * side
    places = torch.arange(per_crop, per_crop * whole.n_crops)
    # Crop by crop, to one raster of the whole picture, less what was padding.
    raster = places.view(rows, columns, side, side).transpose(1, 2)
    raster = raster.reshape(1, rows * side, columns * side)
    raster = unpad_image(raster, image_size)[0]
    newlines = torch.full((len(raster), 1), -1)
    packed = torch.cat((torch.arange(per_crop), torch.cat((raster, newlines), 1).flatten()))
    is_newline = packed < 0
    order = packed[~is_newline]
    return Layout(
        n_placeholders=len(packed),
        boxes=whole.boxes[order],
        candidates=(~is_newline).nonzero().flatten(),
        fixed=is_newline.nonzero().flatten(),
        n_crops=whole.n_crops,
        order=order,
    )


@lru_cache(maxsize=256)
def crop_layout(
    image_size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], crop: int, side: int
) -> Layout:
    """Build the published code's layout: all patches of all crops, the overview first."""
    rows, columns = _grid(image_size, pinpoints, crop)
    tiles = on_picture(tile_boxes(rows, columns, side), image_size, (rows * crop, columns * crop))
    boxes = torch.cat((raster_boxes(side, side), tiles.clamp(0, 1)))
    n_crops = 1 + rows * columns
    return Layout(
        n_placeholders=_n_packed(image_size, rows, columns, side),
        boxes=boxes,
        n_crops=n_crops,
        whole_crops=True,
    )


def on_picture(boxes: Tensor, image_size: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """Convert fractions of a canvas to fractions of the picture that is centred in it.

    Args:
        boxes: x0, y0, x1, y1 as fractions of the canvas, shape (n, 4).
        image_size: height and width of the picture in pixels.
        canvas: height and width of the canvas in pixels.

    Returns:
        As fractions of the picture, outside [0, 1] on the padding, shape (n, 4).
    """
    height, width = image_size
    scale = min(canvas[0] / height, canvas[1] / width)
    fraction_w = min(ceil(width * scale) / canvas[1], 1.0)
    fraction_h = min(ceil(height * scale) / canvas[0], 1.0)
    fraction = torch.tensor([fraction_w, fraction_h, fraction_w, fraction_h])
    return (boxes - (1 - fraction) / 2) / fraction


def canvas_of(
    image_size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """Height and width in pixels of the canvas that the picture is fitted into."""
    return select_best_resolution(image_size, [list(pinpoint) for pinpoint in pinpoints])


def _grid(
    image_size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], crop: int
) -> tuple[int, int]:
    """Crops along the height and the width of that canvas."""
    height, width = canvas_of(image_size, pinpoints)
    return height // crop, width // crop


def _n_packed(image_size: tuple[int, int], rows: int, columns: int, side: int) -> int:
    _, height, width = unpad_image(torch.empty(1, rows * side, columns * side), image_size).shape
    return side * side + height * (width + 1)
