"""Idefics3 and SmolVLM: marked tiles and an overview, merged by pixel shuffle, no [CLS]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import InputError
from budwood.prune.families.base import one_by_one
from budwood.prune.families.tiles import Run, Tiled, Tiles
from budwood.prune.families.towers import refuse_tower
from budwood.prune.saliency import ReceivedRecorder, Recorder


class Idefics3(Tiled):
    """``Idefics3ForConditionalGeneration``.

    In the prompt a tile is ``<fake_token_around_image><row_1_col_1>`` and its placeholders, a row
    of tiles ends with a line break, and the overview comes last, closed by another
    ``<fake_token_around_image>``. All of these stay.

    Saliency is the mean attention received in the tower's last layer, averaged over the patches of
    a token. This is budwood's choice: the tower has no [CLS].
    """

    model_type: ClassVar[str] = "idefics3"
    encoder_inputs: tuple[str, ...] = ("pixel_values", "pixel_attention_mask")
    markers: ClassVar[tuple[int, int]] = (2, 1)
    run_per_tile: ClassVar[bool] = True

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        refuse_tower(model, f"{self.model_type}_vision")

    @property
    def merged(self) -> int:
        return self.model.config.scale_factor

    @property
    def side(self) -> int:
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size // self.merged

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        return MaskedRecorder(self.model.model.vision_model.encoder.layers[-1].self_attn)

    def encoded(self, inputs: Mapping[str, Any]) -> Tensor:
        # By row or by tile, depending on the version of transformers; padding is left out.
        tokens = torch.cat(list(self.encode(inputs).pooler_output))
        return tokens.unflatten(0, (-1, self.side**2))

    def outputs(self, features: Sequence[Tensor]) -> Any:
        return one_by_one(features)

    def real_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        tiles = inputs["pixel_values"].flatten(0, 1)
        return tiles[(tiles != 0).flatten(1).any(1)]  # the model, too, takes zeros for padding

    def some_tiles(self, inputs: Mapping[str, Any], tiles: Tensor) -> dict[str, Any]:
        pixels, some = inputs["pixel_values"].flatten(0, 1), {}
        real = (pixels != 0).flatten(1).any(1).nonzero().flatten()
        for name in self.encoder_inputs:
            if inputs.get(name) is not None:
                some[name] = inputs[name].flatten(0, 1)[real[tiles.to(real.device)]][None]
        return some

    def cut(self, ids: Tensor, runs: Sequence[Run]) -> list[Tiles]:
        images = []
        for row, of_row in groupby(runs, lambda run: run.row):
            images += _cut_row(ids[row].tolist(), list(of_row))
        return images


class MaskedRecorder(ReceivedRecorder):
    """Mean attention received in a layer that attends to no padding inside a tile.

    Args:
        module: the layer's, with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``.
    """

    def watch(self) -> None:
        super().watch()
        self.on_call(self.module, "attention_mask")

    def seen_keys(self) -> Tensor | None:
        mask = self._seen.pop("attention_mask", None)  # None if there is no padding
        if mask is None:
            return None
        mask = mask[:, 0, 0] if mask.ndim == 4 else mask  # the same for all heads and queries
        return mask if mask.dtype == torch.bool else mask == (0 if mask.is_floating_point() else 1)


def _cut_row(row: list[int], runs: Sequence[Run]) -> list[Tiles]:
    """How the images of one row are cut. The token behind the last image closes every image.

    Between two tiles of an image one ``<fake_token_around_image>`` opens the second tile, after a
    line break where a row of tiles ends. Between two images there are two: one closes, one opens.
    """
    if runs[-1].stop == len(row):
        raise InputError(
            f"row {runs[-1].row} of the prompts ends inside an image; truncate no prompt"
        )
    fake = row[runs[-1].stop]
    images, rows_of_tiles = [], [1]
    for run, following in pairwise(runs):
        between = row[run.stop : following.start]
        if between.count(fake) > 1:
            images.append(_tiles(rows_of_tiles, run))
            rows_of_tiles = [1]
        elif between[0] == fake:
            rows_of_tiles[-1] += 1
        else:
            rows_of_tiles.append(1)
    return [*images, _tiles(rows_of_tiles, runs[-1])]


def _tiles(rows: Sequence[int], last: Run) -> Tiles:
    """One image from the number of tiles in each of its rows, the overview being the last row."""
    if len(rows) == 1 and rows[0] == 1:
        return Tiles()
    if len(set(rows[:-1])) != 1 or rows[-1] != 1:
        raise InputError(
            f"the image before position {last.stop} of row {last.row} has rows of "
            f"{', '.join(map(str, rows))} tiles; expected equal rows, then one overview, as the "
            "processor writes them"
        )
    return Tiles(len(rows) - 1, rows[0], overview=True)
