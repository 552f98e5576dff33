"""Images that are cut into tiles, told apart by the prompt; what such families share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import InputError
from budwood.prune.families.base import Family, Layout, raster_boxes, tile_boxes


@dataclass(frozen=True)
class Tiles:
    """How one image is cut.

    Attributes:
        rows: tiles along the height.
        columns: tiles along the width.
        overview: whether one more tile, the last, shows the whole picture.
    """

    rows: int = 1
    columns: int = 1
    overview: bool = False

    def __len__(self) -> int:
        return self.rows * self.columns + self.overview


@dataclass(frozen=True)
class Run:
    """Placeholders without any other token between them.

    Attributes:
        row: row of the batch.
        start: position of the first.
        stop: position after the last.
    """

    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Tiled(Family):
    """Each tile becomes a square of tokens, and each token is made of a square of patches.

    The inputs do not say which tiles belong to one image. The prompt does, by the markers that the
    processor writes around and between its placeholders.

    Attributes:
        run_per_tile: whether there are markers between the tiles of one image.
        markers: how many there are in front of its first placeholder and behind its last one.
    """

    run_per_tile: ClassVar[bool]
    markers: ClassVar[tuple[int, int]]

    @property
    @abstractmethod
    def merged(self) -> int:
        """Patches along a side of one token."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Tokens along a side of one tile."""

    @abstractmethod
    def cut(self, ids: Tensor, runs: Sequence[Run]) -> list[Tiles]:
        """Read off the prompts how each image is cut.

        Args:
            ids: prompts, int64, on the CPU, shape (batch, n_tokens).
            runs: all runs of placeholders in them, in order.

        Raises:
            InputError: the prompt is not laid out as the processor does it.
        """

    @abstractmethod
    def encoded(self, inputs: Mapping[str, Any]) -> Tensor:
        """Encode: projected features of all tiles, shape (n_tiles, side², d_model)."""

    @abstractmethod
    def real_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """All tiles without padding, shape (n_tiles, n_channels, height, width)."""

    def features(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        images = self._split(self.encoded(inputs), self._images(inputs))
        return [tiles.flatten(0, 1) for tiles in images]

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return self._split(self.real_tiles(inputs), self._images(inputs))

    def only(self, inputs: Mapping[str, Any], which: Sequence[int]) -> dict[str, Any]:
        images = self._split(torch.arange(len(self.real_tiles(inputs))), self._images(inputs))
        return self.some_tiles(inputs, torch.cat([images[i] for i in which]))

    def some_tiles(self, inputs: Mapping[str, Any], tiles: Tensor) -> dict[str, Any]:
        """The encoder's inputs of some of :meth:`real_tiles`, given by their numbers."""
        return {self.pixels: self.real_tiles(inputs)[tiles.to(inputs[self.pixels].device)]}

    def extent(self, row: Tensor, start: int, stop: int) -> tuple[int, int]:
        before, behind = self.markers
        return max(start - before, 0), stop + behind

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        return [
            tiled_layout(tiles, self.side, self.merged, self.run_per_tile)
            for tiles in self._images(inputs)
        ]

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        per_image = recorder.saliency().split([layout.n_crops for layout in layouts])
        return [
            layout.ordered(tiles.flatten())
            for tiles, layout in zip(per_image, layouts, strict=True)
        ]

    def keys(self, recorder: Any, layouts: Sequence[Layout]) -> Sequence[Tensor | None]:
        per_image = recorder.keys().split([layout.n_crops for layout in layouts])
        return [
            layout.ordered(tiles.flatten(0, 1))
            for tiles, layout in zip(per_image, layouts, strict=True)
        ]

    def _images(self, inputs: Mapping[str, Any]) -> list[Tiles]:
        if inputs.get("input_ids") is None:
            raise InputError(
                f"pictures of {self.model_type!r} come without input_ids; give the prompts too, "
                "which say where one image ends and the next begins"
            )
        ids = inputs["input_ids"].cpu()
        runs = runs_of(ids, self.image_token_id)
        for run in runs:
            if len(run) % self.side**2 or (self.run_per_tile and len(run) != self.side**2):
                raise InputError(
                    f"row {run.row} has a run of {len(run)} image placeholders at position "
                    f"{run.start}, and a tile takes {self.side**2}; prepare prompts with the "
                    "processor that belongs to the model, and truncate none"
                )
        return self.cut(ids, runs)

    def _split(self, tiles: Tensor, images: Sequence[Tiles]) -> list[Tensor]:
        if len(tiles) != sum(map(len, images)):
            raise InputError(
                f"the prompts have image placeholders for {sum(map(len, images))} tiles, and there "
                f"are {len(tiles)} tiles; prepare both with the processor that belongs to the model"
            )
        return list(tiles.split([len(image) for image in images]))


def runs_of(ids: Tensor, token_id: int) -> list[Run]:
    """All runs of one token.

    Args:
        ids: prompts, int64, on the CPU, shape (batch, n_tokens).
        token_id: the token.
    """
    edges = torch.nn.functional.pad((ids == token_id).int(), (1, 1)).diff(dim=1)
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    stops = (edges == -1).nonzero(as_tuple=True)[1]
    return [Run(*run) for run in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True)]


@lru_cache(maxsize=256)
def tiled_layout(tiles: Tiles, side: int, merged: int, run_per_tile: bool) -> Layout:
    """Tile after tile, row-major in each, the overview last.

    Args:
        tiles: how the image is cut.
        side: tokens along a side of one tile.
        merged: patches along a side of one token.
        run_per_tile: whether there are markers between the tiles.
    """
    n_tiles, per_tile = len(tiles), side * side
    patches = torch.arange(n_tiles * per_tile * merged**2)
    patches = patches.view(n_tiles, side, merged, side, merged).transpose(2, 3)
    boxes = tile_boxes(tiles.rows, tiles.columns, side)
    if tiles.overview:
        boxes = torch.cat((boxes, raster_boxes(side, side)))
    return Layout(
        n_placeholders=n_tiles * per_tile,
        boxes=boxes,
        order=patches.reshape(n_tiles * per_tile, merged**2),
        grid=(side, side) if n_tiles == 1 else None,
        n_crops=n_tiles,
        runs=(per_tile,) * n_tiles if run_per_tile else (),
    )
