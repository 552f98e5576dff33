"""LLaVA-OneVision: LLaVA-NeXT with large rasters shrunk, and squares in prompts of many images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import groupby
from math import ceil, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import AttachError, UnsupportedModelError
from budwood.prune.families.base import Layout, Placing, Visuals, one_by_one, raster_boxes
from budwood.prune.families.llava_next import LlavaNext, anyres_layout, canvas_of, on_picture
from budwood.prune.families.towers import Tower
from budwood.prune.saliency import Recorder


class LlavaOnevision(LlavaNext):
    """``LlavaOnevisionForConditionalGeneration``.

    A prompt of one image has it as LLaVA-NeXT does. A raster that is much larger than ``N`` crops
    (``anyres_max_N``) is shrunk by bilinear interpolation: its tokens are mixtures of patches, and
    saliency goes through the same interpolation. In a prompt of several images each is one crop,
    padded to a square, with one newline.
    """

    model_type: ClassVar[str] = "llava_onevision"
    encoder_inputs: tuple[str, ...] = (
        *LlavaNext.encoder_inputs,
        "vision_aspect_ratio",
        "batch_num_images",
    )
    has_whole_crops: ClassVar[bool] = False

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        self.videos = OnevisionVideos(model, self.tower)
        self._most_crops({})  # a wrong one shows now and not at the first picture

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        config = self.model.config
        pinpoints = tuple(tuple(pinpoint) for pinpoint in config.image_grid_pinpoints)
        crop, side = config.vision_config.image_size, self.tower.side
        most = self._most_crops(inputs)
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        return [
            shrunk_layout((height, width), pinpoints, crop, side, most)
            if alone
            else _square_layout(side)
            for (height, width), alone in zip(sizes, _alone(inputs, len(sizes)), strict=True)
        ]

    def only(self, inputs: Mapping[str, Any], which: Sequence[int]) -> dict[str, Any]:
        counts = inputs.get("batch_num_images")
        some = super().only({**inputs, "batch_num_images": None}, which)
        if counts is None:
            return some
        alone = _alone(inputs, len(inputs["pixel_values"]))
        groups = [list(group) for _, group in groupby(alone[i] for i in which)]
        if any(not group[0] and len(group) == 1 for group in groups):
            raise AttachError(
                "batch_num_images says that the new image is not alone, and without those in "
                "past_key_values it is; give only the new images"
            )
        sizes = [n for group in groups for n in _group_sizes(group)]
        return some | {"batch_num_images": torch.tensor(sizes)}

    def placing(self, layout: Layout) -> Placing:
        """With one crop: without the padding that makes the picture square."""
        if layout.n_crops > 1:
            return super().placing(layout)
        return partial(_in_square, layout.boxes)

    def _most_crops(self, inputs: Mapping[str, Any]) -> int:
        return most_crops(
            inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        )


def _in_square(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes in a picture, of boxes in the square that it was padded to."""
    square = (max(image_size), max(image_size))
    return on_picture(boxes, image_size, square).clamp(0, 1)


class OnevisionVideos(Visuals):
    """Videos of LLaVA-OneVision: each frame is pooled to a quarter, and one newline comes last.

    Pooling is bilinear; saliency goes through the same interpolation.

    Args:
        model: the model.
        tower: its vision tower.
    """

    kind: str = "video"
    pixels: str = "pixel_values_videos"
    encoder_inputs: tuple[str, ...] = (
        "pixel_values_videos",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    def __init__(self, model: Any, tower: Tower) -> None:
        super().__init__(model)
        self.tower = tower

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        return self.tower.recorder(inputs)

    def outputs(self, features: Sequence[Tensor]) -> Any:
        return one_by_one(features)

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        return [_video_layout(len(video), self.tower.side) for video in inputs[self.pixels]]

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        return self._ordered(recorder.saliency(), layouts)

    def keys(self, recorder: Any, layouts: Sequence[Layout]) -> Sequence[Tensor | None]:
        return self._ordered(recorder.keys(), layouts)

    def _ordered(self, frames: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        per_video = frames.split([layout.frames for layout in layouts])
        return [
            layout.ordered(video.flatten(0, 1))
            for video, layout in zip(per_video, layouts, strict=True)
        ]


def most_crops(aspect_ratio: str) -> int:
    """N of ``anyres_max_N``: a raster that is much larger than N crops is shrunk.

    Raises:
        UnsupportedModelError: it is called otherwise.
    """
    most = re.fullmatch(r"anyres_max_(\d+)", aspect_ratio)
    if most is None:
        raise UnsupportedModelError(
            f"vision_aspect_ratio={aspect_ratio!r} is not supported; known: 'anyres_max_N'"
        )
    return int(most[1])


def _group_sizes(alone: Sequence[bool]) -> list[int]:
    """``batch_num_images`` of images that are all alone, or all together."""
    return [1] * len(alone) if alone[0] else [len(alone)]


def _alone(inputs: Mapping[str, Any], n_images: int) -> list[bool]:
    """Whether each image is the only one of its prompt."""
    if inputs.get("batch_num_images") is None:
        return [True] * n_images
    counts = torch.as_tensor(inputs["batch_num_images"]).tolist()
    return [count == 1 for count in counts for _ in range(count)]


@lru_cache(maxsize=256)
def shrunk_layout(
    image_size: tuple[int, int],
    pinpoints: tuple[tuple[int, int], ...],
    crop: int,
    side: int,
    most: int,
) -> Layout:
    """The overview, then the raster with newlines, shrunk if it is much larger than allowed.

    Args:
        image_size: height and width of the picture in pixels.
        pinpoints: heights and widths that pictures are fitted into, in pixels.
        crop: side of one crop in pixels.
        side: patches along a side of one crop.
        most: crops whose patches are allowed (:func:`most_crops`).
    """
    whole = anyres_layout(image_size, pinpoints, crop, side)
    per_crop, rows = side * side, len(whole.fixed)
    assert whole.order is not None
    raster = whole.order[per_crop:].view(rows, -1)
    columns = raster.shape[1]
    ratio = sqrt(rows * columns / (most * per_crop))
    if ratio <= 1.1:
        return whole
    new_rows, new_columns = int(rows // ratio), int(columns // ratio)
    parts, weights = bilinear(rows, columns, new_rows, new_columns)
    overview = torch.arange(per_crop)[:, None].expand(-1, 4)
    alone = torch.tensor([1.0, 0, 0, 0]).expand(per_crop, 4)
    # What is left of the canvas without its padding; a whole number of patches.
    canvas = canvas_of(image_size, pinpoints)
    kept_h, kept_w = rows * crop / side / canvas[0], columns * crop / side / canvas[1]
    left, top = (1 - kept_w) / 2, (1 - kept_h) / 2
    boxes = raster_boxes(new_rows, new_columns) * torch.tensor([kept_w, kept_h, kept_w, kept_h])
    boxes = on_picture(boxes + torch.tensor([left, top, left, top]), image_size, canvas)
    is_newline = torch.zeros(new_rows, new_columns + 1, dtype=torch.bool)
    is_newline[:, -1] = True
    is_newline = torch.cat((torch.zeros(per_crop, dtype=torch.bool), is_newline.flatten()))
    return Layout(
        n_placeholders=len(is_newline),
        boxes=torch.cat((raster_boxes(side, side), boxes.clamp(0, 1))),
        candidates=(~is_newline).nonzero().flatten(),
        fixed=is_newline.nonzero().flatten(),
        n_crops=whole.n_crops,
        order=torch.cat((overview, raster.flatten()[parts])),
        weights=torch.cat((alone, weights)),
    )


@lru_cache(maxsize=16)
def _square_layout(side: int) -> Layout:
    """One crop and one newline."""
    return Layout(
        n_placeholders=side * side + 1,
        boxes=raster_boxes(side, side),
        candidates=torch.arange(side * side),
        fixed=torch.tensor([side * side]),
        grid=(side, side),
    )


@lru_cache(maxsize=64)
def _video_layout(frames: int, side: int) -> Layout:
    """Frame after frame, each pooled to half its side, and one newline."""
    pooled = ceil(side / 2)
    parts, weights = bilinear(side, side, pooled, pooled)
    first = side * side * torch.arange(frames)[:, None, None]
    n_tokens = frames * pooled * pooled
    return Layout(
        n_placeholders=n_tokens + 1,
        boxes=raster_boxes(pooled, pooled).repeat(frames, 1),
        candidates=torch.arange(n_tokens),
        fixed=torch.tensor([n_tokens]),
        order=(first + parts).flatten(0, 1),
        weights=weights.repeat(frames, 1),
        grid=(pooled, pooled),
        frames=frames,
    )


def bilinear(rows: int, columns: int, new_rows: int, new_columns: int) -> tuple[Tensor, Tensor]:
    """Write bilinear interpolation of a raster as weighted sums of four places.

    As ``torch.nn.functional.interpolate(mode="bilinear")`` without antialiasing.

    Args:
        rows: of the raster.
        columns: of the raster.
        new_rows: of the result.
        new_columns: of the result.

    Returns:
        Raster indices, int64, and weights, float32, both of shape (new_rows · new_columns, 4).
    """
    y, along_y = _linear(rows, new_rows)
    x, along_x = _linear(columns, new_columns)
    places = y[:, None, :, None] * columns + x[None, :, None, :]
    weights = along_y[:, None, :, None] * along_x[None, :, None, :]
    return places.reshape(-1, 4), weights.reshape(-1, 4)


def _linear(n: int, n_new: int) -> tuple[Tensor, Tensor]:
    """Both neighbours of each new place along one axis and their weights, shape (n_new, 2)."""
    where = ((torch.arange(n_new) + 0.5) * (n / n_new) - 0.5).clamp(min=0)
    low = where.floor().long()
    high = (low + 1).clamp(max=n - 1)
    share = where - low
    return torch.stack((low, high), 1), torch.stack((1 - share, share), 1)
