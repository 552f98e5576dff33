"""InternVL: tiles in one run of placeholders, merged by pixel shuffle, a tower with [CLS]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from budwood.errors import UnsupportedModelError
from budwood.prune.families.base import Layout, Placing, one_by_one
from budwood.prune.families.tiles import Run, Tiled, Tiles, tiled_layout
from budwood.prune.families.towers import output_layer, refuse_tower
from budwood.prune.saliency import ClsRecorder, Recorder


class InternVL(Tiled):
    """``InternVLForConditionalGeneration`` (InternVL3 and others in transformers' format).

    In the prompt an image is one run of ``<IMG_CONTEXT>`` between ``<img>`` and ``</img>``, without
    markers between its tiles. The frames of a video are single images to this model, and each is
    pruned by itself.

    Saliency is [CLS] attention, averaged over the patches of a token.
    """

    model_type: ClassVar[str] = "internvl"
    encoder_inputs: tuple[str, ...] = (
        "pixel_values",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    markers: ClassVar[tuple[int, int]] = (1, 1)
    run_per_tile: ClassVar[bool] = False

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        refuse_tower(model, "internvl_vision")
        strategy = model.config.vision_feature_select_strategy
        if strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} keeps [CLS], which has no place in a "
                "square of tokens; set it to 'default'"
            )
        self.recorder({})  # a wrong layer shows now and not at the first picture

    @property
    def merged(self) -> int:
        return merged_patches(self.model.config)

    @property
    def side(self) -> int:
        return tokens_along(self.model.config)

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        index = inputs.get("vision_feature_layer")
        index = self.model.config.vision_feature_layer if index is None else index
        if not isinstance(index, int):
            raise UnsupportedModelError(
                f"vision_feature_layer={index} is a list, and {self.model_type!r} takes one layer"
            )
        layer = output_layer(self.model.model.vision_tower.encoder.layer, index)
        # Behind the norms of queries and keys, which some towers have and others leave empty.
        return ClsRecorder(layer.attention, "q_norm", "k_norm")

    def encoded(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.encode(inputs).pooler_output

    def outputs(self, features: Sequence[Tensor]) -> Any:
        return one_by_one(features)

    def real_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        return inputs["pixel_values"]

    def cut(self, ids: Tensor, runs: Sequence[Run]) -> list[Tiles]:
        return [square(len(run) // self.side**2) for run in runs]

    def placing(self, layout: Layout) -> Placing:
        """Use the arrangement of this many tiles that is nearest to the picture's proportions."""
        return partial(_arranged, layout.n_crops, (self.side, self.merged, self.run_per_tile))


def merged_patches(config: Any) -> int:
    """Patches along a side of one token, of a model with this configuration."""
    return round(1 / config.downsample_ratio)


def tokens_along(config: Any) -> int:
    """Tokens along a side of one tile, of a model with this configuration."""
    vision = config.vision_config
    return vision.image_size[0] // vision.patch_size[0] // merged_patches(config)


def square(n_tiles: int) -> Tiles:
    """The arrangement where the picture's size is unknown: as square as can be."""
    return _nearest(n_tiles, 1.0)


def _arranged(n_tiles: int, tile: tuple[int, int, bool], image_size: tuple[int, int]) -> Tensor:
    return tiled_layout(_nearest(n_tiles, image_size[1] / image_size[0]), *tile).boxes


def _nearest(n_tiles: int, proportions: float) -> Tiles:
    """The processor's arrangement of tiles: columns over rows is nearest to width over height."""
    if n_tiles == 1:
        return Tiles()
    n_tiles -= 1  # the overview
    rows = [rows for rows in range(1, n_tiles + 1) if n_tiles % rows == 0]
    nearest = min(rows, key=lambda rows: abs(proportions - n_tiles / rows / rows))
    return Tiles(nearest, n_tiles // nearest, overview=True)
