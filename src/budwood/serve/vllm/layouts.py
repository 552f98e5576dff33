"""Where the tokens of an image are, told by the configuration and what the processor says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from budwood.errors import UnsupportedModelError
from budwood.prune.families.base import Layout
from budwood.prune.families.llava import one_crop_layout
from budwood.prune.families.llava_next import anyres_layout
from budwood.prune.families.qwen import frames_layout
from budwood.prune.families.qwen2_5_vl import windowed_layout

_WITH_CLS = {"clip_vision_model": True, "siglip_vision_model": False}


def has_cls(config: Any) -> bool:
    """Whether the vision tower's first token is [CLS].

    Raises:
        UnsupportedModelError: the tower is neither CLIP nor SigLIP.
    """
    tower = config.vision_config.model_type
    if tower not in _WITH_CLS:
        raise UnsupportedModelError(
            f"vision tower {tower!r} of {config.model_type!r} is not served; known: "
            f"{', '.join(_WITH_CLS)}"
        )
    return _WITH_CLS[tower]


def side_of(config: Any) -> int:
    """Patches along a side of one crop."""
    return config.vision_config.image_size // config.vision_config.patch_size


def llava_layout(config: Any, image: Mapping[str, Any]) -> Layout:
    """Of an image in LLaVA: one square of patches.

    Args:
        config: the model's.
        image: what the processor says of this image, by name.
    """
    side, with_cls = side_of(config), has_cls(config)
    drops_first = config.vision_feature_select_strategy == "default"
    return one_crop_layout(side * side + with_cls - drops_first, side, with_cls and not drops_first)


def llava_next_layout(config: Any, image: Mapping[str, Any]) -> Layout:
    """Of an image in LLaVA-NeXT, with ``image_sizes``: an overview and unpadded crops."""
    height, width = torch.as_tensor(image["image_sizes"]).tolist()
    pinpoints = tuple(tuple(pinpoint) for pinpoint in config.image_grid_pinpoints)
    has_cls(config)
    return anyres_layout(
        (height, width), pinpoints, config.vision_config.image_size, side_of(config)
    )


def qwen_layout(config: Any, image: Mapping[str, Any]) -> Layout:
    """Of an image in Qwen2-VL and Qwen3-VL, with ``image_grid_thw``."""
    return frames_layout(1, *_merged_grid(config, image))


def qwen25_layout(config: Any, image: Mapping[str, Any]) -> Layout:
    """Of an image in Qwen2.5-VL, whose encoder has it window by window."""
    return windowed_layout(1, *_merged_grid(config, image), config.vision_config)


def _merged_grid(config: Any, image: Mapping[str, Any]) -> tuple[int, int]:
    merged = config.vision_config.spatial_merge_size
    _, height, width = torch.as_tensor(image["image_grid_thw"]).tolist()
    return height // merged, width // merged
