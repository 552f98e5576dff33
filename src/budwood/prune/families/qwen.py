"""What all Qwen-VL models share: pictures of any size, packed and merged 2×2, and M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import InputError
from budwood.prune.families.base import Family, Layout, raster_boxes
from budwood.prune.saliency import OutputRecorder, PackedRecorder, Recorder

_INPUTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
"""Packed patches, and the frames, rows and columns of patches of each image or video."""


class QwenVL(Family):
    """Images of a Qwen-VL model; ``videos`` is the same for its videos.

    Saliency is the mean attention received in a full-attention block, in which each frame attends
    to itself, averaged over the patches of a merged token. This is budwood's choice: the tower has
    no [CLS]. ``patches="max"`` takes the largest of them; ``"norm"`` the mean L2 norm of the
    patches' features before the merger, which normalises them.

    Args:
        model: a transformers model for conditional generation.
        processor: its processor, if there is one at hand.
        whole_crops: not known to these models.
        kind: ``"image"`` or ``"video"``.
    """

    merges_patches: ClassVar[bool] = True
    has_coordinates: ClassVar[bool] = True

    def __init__(
        self, model: Any, processor: Any = None, whole_crops: bool = False, kind: str = "image"
    ) -> None:
        super().__init__(model, processor, whole_crops)
        self.kind = kind
        self.encoder_inputs = self.pixels, self.grids = _INPUTS[kind]
        self.vision = model.config.vision_config
        self._deltas_before = model.model.rope_deltas
        if kind == "image":
            self.videos = type(self)(model, processor, kind="video")

    @property
    def block(self) -> int:
        """The block whose attention is read: the last with full attention."""
        return self.vision.depth - 1

    def layout(self, frames: int, rows: int, columns: int) -> Layout:
        """Where the merged tokens of one image or video are."""
        return frames_layout(frames, rows, columns)

    def encode(self, inputs: Mapping[str, Any]) -> Any:
        grids = inputs.get(self.grids)
        n_given = len(inputs[self.pixels])
        n_needed = None if grids is None else int(grids.prod(-1).sum())
        if n_needed != n_given:
            said = "is missing" if n_needed is None else f"has {n_needed} patches"
            raise InputError(
                f"{self.grids} {said}, {self.pixels} has {n_given} patches; pass both as the "
                "processor returns them"
            )
        return super().encode(inputs)

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        blocks = self.model.model.visual.blocks
        return (
            OutputRecorder(blocks[-1])
            if self.patches == "norm"
            else PackedRecorder(blocks[self.block].attn)
        )

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return list(inputs[self.pixels].split(inputs[self.grids].prod(-1).tolist()))

    def only(self, inputs: Mapping[str, Any], which: Sequence[int]) -> dict[str, Any]:
        pictures = self.pictures(inputs)
        some = {
            self.pixels: torch.cat([pictures[i] for i in which]),
            self.grids: inputs[self.grids][list(which)],
        }
        seconds = inputs.get("second_per_grid_ts")
        if self.kind == "video" and seconds is not None:
            some["second_per_grid_ts"] = torch.as_tensor(seconds)[list(which)]
        return some

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        merged = self.vision.spatial_merge_size
        layouts: list[Layout] = []
        for frames, height, width in inputs[self.grids].tolist():
            if self.kind == "image" and frames != 1:
                raise InputError(f"image_grid_thw has {frames} frames for an image; give 1")
            layouts.append(self.layout(frames, height // merged, width // merged))
        return layouts

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        unit = self.vision.spatial_merge_size**2
        if self.patches == "norm":
            scores = recorder.output().float().norm(dim=-1)
        else:
            lengths = [
                unit * layout.n_candidates // layout.frames
                for layout in layouts
                for _ in range(layout.frames)
            ]
            scores = torch.cat(recorder.saliency(lengths))
        units = scores.view(-1, unit)
        return ordered_units(units.amax(1) if self.patches == "max" else units.mean(1), layouts)

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor | None:
        kinds = self._token_types(inputs, ids, mask)
        given = {
            name: torch.as_tensor(inputs[name]).cpu()
            for name in (*(grids for _, grids in _INPUTS.values()), "second_per_grid_ts")
            if inputs.get(name) is not None
        }
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, attention_mask=mask, **given
        )
        return positions

    def _token_types(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        """0 for text, 1 for images, 2 for videos, as the processor gives them.

        Raises:
            InputError: they are missing, or do not fit the prompt.
        """
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None:
            raise InputError(
                "mm_token_type_ids is missing, without which the model counts tokens and ignores "
                "where they are in a picture; pass all that the processor returns"
            )
        expected = torch.zeros_like(ids)
        for number, visuals in enumerate(self.kinds, start=1):
            expected += number * (ids == visuals.token_id)
        n_wrong = int(((kinds.cpu() != expected) & mask.bool()).sum())
        if n_wrong:
            raise InputError(
                f"mm_token_type_ids disagrees with input_ids for {n_wrong} tokens; give 1 for "
                "placeholders of images, 2 for those of videos and 0 for text"
            )
        return kinds.cpu()

    def placed(self, positions: Tensor, mask: Tensor) -> None:
        # As the model does itself: decoding by hand continues from count + delta.
        last = positions.amax((0, 2))
        self.model.model.rope_deltas = (last + 1 - mask.sum(-1)).unsqueeze(1)

    def release(self) -> None:
        self.model.model.rope_deltas = self._deltas_before


def ordered_units(scores: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    """Scores of the merged tokens of packed visuals, in the LLM's order, one tensor per visual."""
    per_visual = scores.split([layout.n_candidates for layout in layouts])
    return [layout.ordered(some) for some, layout in zip(per_visual, layouts, strict=True)]


@lru_cache(maxsize=256)
def frames_layout(
    frames: int,
    rows: int,
    columns: int,
    order: tuple[int, ...] | None = None,
    one_run: bool = True,
) -> Layout:
    """Frames of one raster each, one after the other.

    Args:
        frames: 1 for an image.
        rows: merged tokens along the height.
        columns: merged tokens along the width.
        order: place of each of a frame's tokens in the encoder's order; None if it is the LLM's.
        one_run: all placeholders stand together in the prompt, and not frame by frame.
    """
    n_tokens = rows * columns
    first = n_tokens * torch.arange(frames)[:, None]
    return Layout(
        n_placeholders=frames * n_tokens,
        boxes=raster_boxes(rows, columns).repeat(frames, 1),
        grid=(rows, columns),
        order=None if order is None else (first + torch.tensor(order)).flatten(),
        frames=frames,
        runs=() if one_run else (n_tokens,) * frames,
    )
