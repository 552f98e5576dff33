"""Scenes as the encoder cuts them up and the LLM reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from budwood.prune.families.base import raster_boxes
from budwood.prune.families.llava_next import anyres_layout
from budwood.sprout.model import PINPOINTS, image_tensor, make_high_image_processor, tower_config
from budwood.sprout.scenes import SIZE, Scene, SceneObject

SIDE = SIZE // tower_config().patch_size
PATCHES = SIDE**2
NEWLINE = 1_000_000
"""Visual token that is no patch."""


@dataclass
class Picture:
    """A scene, its crops, and its visual tokens in the LLM's order.

    A visual token is the number of its patch, counted over all crops, or `NEWLINE`.
    """

    scene: Scene
    pixels: Tensor  # (n_crops, 3, 336, 336)
    tokens: list[int]
    centres: dict[int, tuple[float, float]]  # patch to x and y in px of the scene
    covers: dict[int, SceneObject | None] = field(init=False)  # patch to the object at its centre

    def __post_init__(self) -> None:
        self.covers = {patch: at(self.scene, *xy) for patch, xy in self.centres.items()}

    @property
    def patches(self) -> list[int]:
        return list(self.centres)


def at(scene: Scene, x: float, y: float) -> SceneObject | None:
    """The object at a point of the scene."""
    for thing in scene.objects:
        left, top, right, bottom = thing.outer
        if left <= x < right and top <= y < bottom:
            return thing
    return None


def small_picture(scene: Scene) -> Picture:
    """A scene of one crop, as `LlavaForConditionalGeneration` sees it."""
    centres = _centres(raster_boxes(SIDE, SIDE), scene)
    return Picture(
        scene,
        image_tensor(scene.image)[None],
        list(range(PATCHES)),
        dict(enumerate(centres)),
    )


def high_resolution_picture(scene: Scene) -> Picture:
    """A scene of an overview and crops, as `LlavaNextForConditionalGeneration` sees it."""
    width, height = scene.image.size
    layout = anyres_layout((height, width), PINPOINTS, SIZE, SIDE)
    assert layout.order is not None and layout.candidates is not None
    tokens = torch.full((layout.n_placeholders,), NEWLINE)
    tokens[layout.candidates] = layout.order
    centres = _centres(layout.boxes, scene)
    return Picture(
        scene,
        _image_processor()(scene.image, return_tensors="pt")["pixel_values"][0],
        tokens.tolist(),
        dict(zip(layout.order.tolist(), centres, strict=True)),
    )


_image_processor = cache(make_high_image_processor)


def _centres(boxes: Tensor, scene: Scene) -> list[tuple[float, float]]:
    width, height = scene.image.size
    x0, y0, x1, y1 = boxes.unbind(-1)
    xy = torch.stack(((x0 + x1) / 2 * width, (y0 + y1) / 2 * height), -1)
    return [(x, y) for x, y in xy.tolist()]
