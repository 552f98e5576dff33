"""Where the tokens of an image are, told by the configuration and what the processor says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from budwood.errors import UnsupportedModelError
from budwood.prune.families.base import Layout
from budwood.prune.families.internvl import merged_patches, square, tokens_along
from budwood.prune.families.llava import one_crop_layout
from budwood.prune.families.llava_next import anyres_layout
from budwood.prune.families.llava_onevision import most_crops, shrunk_layout
from budwood.prune.families.qwen import frames_layout
from budwood.prune.families.qwen2_5_vl import windowed_layout
from budwood.prune.families.tiles import tiled_layout

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
    return anyres_layout(*_fitted(config, image), config.vision_config.image_size, side_of(config))


def onevision_layout(config: Any, image: Mapping[str, Any]) -> Layout:
    """Of an image in LLaVA-OneVision: the same, and shrunk if it is large.

    vLLM has each image so, also where several share a prompt.
    """
    crop, most = config.vision_config.image_size, most_crops(config.vision_aspect_ratio)
    return shrunk_layout(*_fitted(config, image), crop, side_of(config), most)


def _fitted(config: Any, image: Mapping[str, Any]) -> tuple[tuple[int, int], Any]:
    """An image's height and width, and those that it may be fitted into."""
    height, width = torch.as_tensor(image["image_sizes"]).tolist()
    return (height, width), tuple(tuple(pinpoint) for pinpoint in config.image_grid_pinpoints)


def internvl_layout(config: Any, image: Mapping[str, Any]) -> Layout:
    """Of an image in InternVL, with ``image_num_patches``, which counts its tiles."""
    tiles = square(int(image["image_num_patches"]))
    return tiled_layout(tiles, tokens_along(config), merged_patches(config), run_per_tile=False)


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


def scores_of_crops(
    scores: Tensor, n_crops: Sequence[int], layouts: Sequence[Layout]
) -> list[Tensor]:
    """Scores of each image's candidates, from those of the patches of all crops.

    Args:
        scores: one row a crop, shape (n_crops_of_all, n_patches).
        n_crops: of each image, with those that pad a batch.
        layouts: of the images.

    Returns:
        One tensor an image, shape (n_candidates,).
    """
    return [
        layout.ordered(crops[: layout.n_crops].flatten())
        for crops, layout in zip(scores.split(list(n_crops)), layouts, strict=True)
    ]


def check_config(config: Any) -> None:
    """Refuse a configuration whose images vLLM encodes otherwise than transformers.

    Raises:
        UnsupportedModelError: it has a tower or a setting that is not served.
    """
    _CHECKS.get(config.model_type, _fine)(config)


def _fine(config: Any) -> None:
    """Nothing to refuse."""


def _refuse_onevision(config: Any) -> None:
    has_cls(config)
    if config.vision_aspect_ratio != _SHRUNK:
        raise UnsupportedModelError(
            f"vision_aspect_ratio={config.vision_aspect_ratio!r} is not served: vLLM takes every "
            f"model as {_SHRUNK!r}; use budwood.prune.attach"
        )


def _refuse_internvl(config: Any) -> None:
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if layer != -1 or strategy != "default":
        raise UnsupportedModelError(
            f"vision_feature_layer={layer} with vision_feature_select_strategy={strategy!r} is not "
            "served: vLLM takes the patches of the last layer; use budwood.prune.attach"
        )


_SHRUNK = "anyres_max_9"
_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "llava": has_cls,
    "llava_next": has_cls,
    "llava_onevision": _refuse_onevision,
    "internvl": _refuse_internvl,
}
