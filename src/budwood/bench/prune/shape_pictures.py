"""One square picture for each kind of model: its inputs, and its part of the prompt."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from budwood.bench.prune.shape_models import BREAK, END, FAKE, IMAGE, START, TILE

Picture: TypeAlias = tuple[dict[str, Tensor], list[int]]
"""Inputs by name, and token ids."""

SIDE = 1008
"""Pixels along a side where a model takes any size; rounded down to whole patches."""
MARKED_ROWS = 4
"""Rows, and columns, of marked tiles."""


def one_crop(config: Any) -> Picture:
    """A picture of the tower's own size."""
    return {"pixel_values": _crops(config, 1)}, [IMAGE] * _patches(config) ** 2


def pooled(config: Any) -> Picture:
    """A picture of the tower's own size, pooled to a fixed number of tokens, with markers."""
    tokens = [START, *[IMAGE] * config.mm_tokens_per_image, END]
    return {"pixel_values": _crops(config, 1)}, tokens


def five_crops(config: Any) -> Picture:
    """The overview, and four tiles with a newline after each row of patches."""
    size, side = 2 * config.vision_config.image_size, _patches(config)
    inputs = {
        "pixel_values": _crops(config, 5)[None],
        "image_sizes": torch.tensor([[size, size]]),
    }
    return inputs, [IMAGE] * (side**2 + 2 * side * (2 * side + 1))


def tiles_in_a_run(config: Any) -> Picture:
    """Four tiles and the overview, with markers around all of them."""
    height, width = config.vision_config.image_size
    tokens = [START, *[IMAGE] * (5 * config.image_seq_length), END]
    return {"pixel_values": torch.randn(5, 3, height, width)}, tokens


def marked_tiles(config: Any) -> Picture:
    """Rows of tiles and the overview, each with markers."""
    tile = [FAKE, TILE, *[IMAGE] * (_patches(config) // config.scale_factor) ** 2]
    tokens = [*[*tile * MARKED_ROWS, BREAK] * MARKED_ROWS, *tile, FAKE]
    return {"pixel_values": _crops(config, MARKED_ROWS**2 + 1)[None]}, tokens


def rows(config: Any) -> Picture:
    """A break after each row of tokens, and an end after the last."""
    unit = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    n_rows = SIDE // unit
    size = n_rows * unit
    inputs = {
        "pixel_values": torch.randn(1, 3, size, size),
        "image_sizes": torch.tensor([[size, size]]),
    }
    return inputs, [*([*[IMAGE] * n_rows, START] * n_rows)[:-1], END]


def patches(config: Any) -> Picture:
    """Patches of a still picture, each twice in time, merged 2×2, with markers."""
    patch = config.vision_config.patch_size
    side = SIDE // patch // 2 * 2
    inputs = {
        "pixel_values": torch.randn(side * side, 3 * 2 * patch * patch),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }
    return inputs, [START, *[IMAGE] * (side * side // 4), END]


def _patches(config: Any) -> int:
    """Along a side of a crop."""
    return config.vision_config.image_size // config.vision_config.patch_size


def _crops(config: Any, n_crops: int) -> Tensor:
    side = config.vision_config.image_size
    return torch.randn(n_crops, 3, side, side)
