"""LLaVA: one crop per image, a CLIP or SigLIP tower, positions that count tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.prune.families.base import Family, Layout, Placing, raster_boxes, unmoved
from budwood.prune.families.towers import Tower
from budwood.prune.saliency import Recorder


class Llava(Family):
    """``LlavaForConditionalGeneration`` (LLaVA-1.5 and the sprout model)."""

    model_type: ClassVar[str] = "llava"
    encoder_inputs: tuple[str, ...] = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    has_whole_crops: ClassVar[bool] = True

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        self.tower = Tower(model)

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        return self.tower.recorder(inputs)

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        # "full" keeps [CLS] among the features. It is not a patch, so not a candidate.
        with_cls = self.tower.has_cls and not self.tower.drops_first(inputs)
        return [one_crop_layout(len(image), self.tower.side, with_cls) for image in features]

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        return candidates_of(recorder.saliency(), layouts)

    def keys(self, recorder: Any, layouts: Sequence[Layout]) -> Sequence[Tensor | None]:
        return candidates_of(recorder.keys(), layouts)

    def placing(self, layout: Layout) -> Placing:
        """In the centre that is cropped or the square that is padded, if the processor is known."""
        return partial(in_view, layout.boxes, getattr(self.processor, "image_processor", None))


def candidates_of(patches: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    """Scores or keys of the patches that are candidates.

    A tower without [CLS] under "default" loses its first patch, so they are counted from the end.

    Args:
        patches: what the tower gives for all patches, shape (n_images, n_patches, …).
        layouts: one per image.
    """
    return [row[-layout.n_candidates :] for row, layout in zip(patches, layouts, strict=True)]


@lru_cache(maxsize=16)
def one_crop_layout(n_features: int, side: int, with_cls: bool) -> Layout:
    """One square of patches.

    Args:
        n_features: tokens that the image takes; one less than side² where the first is dropped.
        side: patches along a side of the square.
        with_cls: the first feature is [CLS], which always stays.
    """
    n_candidates = n_features - with_cls
    complete = n_candidates == side * side
    return Layout(
        n_placeholders=n_features,
        boxes=raster_boxes(side, side)[-n_candidates:],
        candidates=torch.arange(1, n_features) if with_cls else None,
        fixed=torch.arange(int(with_cls)),
        grid=(side, side) if complete else None,
    )


def in_view(boxes: Tensor, image_processor: Any, image_size: tuple[int, int]) -> Tensor:
    """Boxes in the picture, of boxes in the part of it that the encoder sees."""
    view = encoder_view(image_processor, image_size)
    if view is None:
        return unmoved(boxes, image_size)
    x0, y0, x1, y1 = view
    scale = torch.tensor([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
    return (boxes * scale + torch.tensor([x0, y0, x0, y0])).clamp(0, 1)


def encoder_view(
    image_processor: Any, image_size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Find the part of a picture that a CLIP-like image processor shows to the encoder.

    Args:
        image_processor: with ``do_pad``, ``do_center_crop``, ``size`` and ``crop_size``; None if
            unknown, which counts as stretching the whole picture.
        image_size: height and width in pixels.

    Returns:
        x0, y0, x1, y1 as fractions of the picture's size; outside [0, 1] where it is padded. None
        for the whole picture.
    """
    height, width = image_size
    shortest_edge = _shortest_edge(image_processor)
    if getattr(image_processor, "do_pad", False):
        seen_h = seen_w = max(height, width)
    elif getattr(image_processor, "do_center_crop", False) and shortest_edge:
        pixels = min(height, width) / shortest_edge
        seen_h = image_processor.crop_size["height"] * pixels
        seen_w = image_processor.crop_size["width"] * pixels
    else:
        return None
    left, top = (1 - seen_w / width) / 2, (1 - seen_h / height) / 2
    return left, top, 1 - left, 1 - top


def _shortest_edge(image_processor: Any) -> int | None:
    size = getattr(image_processor, "size", None)
    return size["shortest_edge"] if size is not None and "shortest_edge" in size else None
