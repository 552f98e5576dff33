"""Pixtral and Mistral 3: images of any size in one sequence, a break token after each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from budwood.errors import InputError
from budwood.prune.families.base import Family, Layout, raster_boxes
from budwood.prune.families.towers import output_layer, refuse_tower
from budwood.prune.saliency import PixtralRecorder


class Pixtral(Family):
    """``LlavaForConditionalGeneration`` with a Pixtral tower, as in ``mistral-community``'s models.

    Break and end tokens are text of the prompt. They stay, also behind a row that is dropped
    altogether. They are no part of the question.

    Saliency is the mean attention received within the image, in the layer whose output is
    projected. This is budwood's choice: the tower has no [CLS].
    """

    model_type: ClassVar[str] = "llava-pixtral"
    encoder_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        refuse_tower(model, "pixtral")
        self.recorder({})  # a wrong layer shows now and not at the first picture

    @property
    def merge(self) -> int:
        """Patches along a side of the square that becomes one token."""
        return 1

    def recorder(self, inputs: Mapping[str, Any]) -> PixtralRecorder:
        index = inputs.get("vision_feature_layer")
        index = self.model.config.vision_feature_layer if index is None else index
        index = index if isinstance(index, int) else index[-1]
        layers = self.model.model.vision_tower.transformer.layers
        return PixtralRecorder(output_layer(layers, index).attention)

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()  # padding may differ
        return [image[:, :h, :w] for image, (h, w) in zip(inputs["pixel_values"], sizes)]

    def features(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        if inputs.get("image_sizes") is None:
            raise InputError("image_sizes is missing; pass all that the processor returns")
        return super().features(inputs)

    def extent(self, row: Tensor, start: int, stop: int) -> tuple[int, int]:
        return start, stop + 1  # the end token

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        unit = self.model.config.vision_config.patch_size * self.merge
        layouts = []
        for height, width in torch.as_tensor(inputs["image_sizes"]).tolist():
            if height % unit or width % unit:
                raise InputError(
                    f"image_sizes has {height} × {width} pixels, not multiples of {unit}; "
                    "pass the sizes that the processor returns"
                )
            layouts.append(_layout(height // unit, width // unit))
        return layouts

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        grids = [[self.merge * side for side in layout.grid or ()] for layout in layouts]
        per_image = recorder.saliency([rows * columns for rows, columns in grids])
        return [
            avg_pool2d(patches.view(1, *grid), self.merge).flatten()
            for patches, grid in zip(per_image, grids, strict=True)
        ]


class Mistral3(Pixtral):
    """``Mistral3ForConditionalGeneration`` (Mistral Small 3.1 and later).

    Saliency of a token is the mean over the patches that are merged into it.
    """

    model_type: ClassVar[str] = "mistral3"
    encoder_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
    )

    @property
    def merge(self) -> int:
        return self.model.config.spatial_merge_size


@lru_cache(maxsize=256)
def _layout(rows: int, columns: int) -> Layout:
    return Layout(
        n_placeholders=rows * columns,
        boxes=raster_boxes(rows, columns),
        grid=(rows, columns),
        runs=(columns,) * rows,
    )
