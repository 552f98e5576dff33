"""The interface of a model family: where things are in a model. No mathematics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from budwood.prune.saliency import Recorder

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The view of an encoder that sees the whole picture."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of one image are. On the CPU, and shared between images of equal size.

    *Candidates* are the tokens that a method chooses from; the others, such as newlines, stay.

    Attributes:
        n_placeholders: tokens that the image takes in the prompt.
        boxes: x0, y0, x1, y1 of each candidate in the picture that the encoder sees, as fractions
            of its width and height in [0, 1], float32, shape (n_candidates, 4).
        candidates: features that may be dropped, in the LLM's order, int64, shape
            (n_candidates,); None if all may.
        fixed: features that always stay, int64, shape (n_fixed,).
        order: place of each candidate in the encoder's order, int64, shape (n_candidates,), or
            (n_candidates, n_parts) if it is made of several; None if the LLM has the same order.
        weights: how much each part counts, float32, shape (n_candidates, n_parts); None if all
            count the same.
        grid: rows and columns of the candidates if they form one raster, else None.
        n_crops: crops of equal size that the encoder saw.
        runs: placeholders of each piece, where other tokens such as timestamps stand between the
            pieces; empty if they are in one piece.
        whole_crops: features come crop by crop and not as the LLM has them; any placeholder may
            then stand for any feature.
    """

    n_placeholders: int
    boxes: Tensor
    candidates: Tensor | None = None
    fixed: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    order: Tensor | None = None
    weights: Tensor | None = None
    grid: tuple[int, int] | None = None
    n_crops: int = 1
    runs: tuple[int, ...] = ()
    whole_crops: bool = False

    @property
    def n_candidates(self) -> int:
        """Tokens that a method chooses from."""
        return len(self.boxes)

    @property
    def run_lengths(self) -> tuple[int, ...]:
        """Placeholders of each piece, also of a single one."""
        return self.runs or (self.n_placeholders,)

    def ordered(self, scores: Tensor) -> Tensor:
        """Move scores, or other values, from the encoder's order into the LLM's.

        A candidate that is made of several of the encoder's tokens gets their (weighted) mean.

        Args:
            scores: of each token of the encoder, shape (n_tokens, ...), on any device.

        Returns:
            Of each candidate, shape (n_candidates, ...).
        """
        if self.order is None:
            return scores
        parts = scores[self.order.to(scores.device, non_blocking=True)]
        if self.order.ndim == 1:
            return parts
        if self.weights is None:
            return parts.mean(1)
        weights = self.weights.to(scores.device, scores.dtype, non_blocking=True)
        return torch.einsum("nk,nk...->n...", weights, parts)


class Family(ABC):
    """Where a model of one ``config.model_type`` keeps what pruning needs.

    Subclasses know names and orders. Scores, choices and prompts are not their business.

    Attributes:
        model_type: the ``config.model_type`` that it is for.
        encoder_inputs: inputs that encoding consumes; the LLM does not see them.
        markers: tokens of an image in front of its first placeholder and behind its last one.
        video_inputs: inputs that mean there is a video, which is never pruned.
        has_whole_crops: it can give whole crops, as published LLaVA code does.

    Args:
        model: a transformers model for conditional generation.
        processor: its processor, if there is one at hand; only :meth:`view` reads it.
        whole_crops: give all crops one after the other, without unpadding or newlines.

    Raises:
        UnsupportedModelError: a part of the model is of a kind that the family does not know.
    """

    model_type: ClassVar[str]
    encoder_inputs: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[int, int]] = (0, 0)
    video_inputs: ClassVar[tuple[str, ...]] = ()
    has_whole_crops: ClassVar[bool] = False

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        self.model = model
        self.processor = processor
        self.whole_crops = whole_crops

    @property
    def image_token_id(self) -> int:
        """The placeholder in the prompt that each visual token replaces."""
        return self.model.config.image_token_id

    @property
    def wrapping_ids(self) -> frozenset[int]:
        """Special tokens around an image, which neither are text nor end a turn."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = (getattr(self.model.config, name, None) for name in names)
        return frozenset(i for i in ids if i is not None)

    @abstractmethod
    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        """Make hooks for the layer whose attention is the saliency; they last one encoder run."""

    def features(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Encode: projected features, one tensor per image, shape (n_features, d_model)."""
        given = {name: inputs[name] for name in self.encoder_inputs if name in inputs}
        return list(self.model.get_image_features(**given, return_dict=True).pooler_output)

    def packed(self, features: Sequence[Tensor]) -> Any:
        """Put kept features into the form in which the model takes them (``pooler_output``).

        Args:
            features: one tensor per image, shape (n_kept, d_model).
        """
        return list(features)

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The pixels by which each image is known again, one tensor per image."""
        return list(inputs["pixel_values"])

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Say where the tokens of each image are."""

    @abstractmethod
    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Saliency of the candidates, one float32 tensor per image, shape (n_candidates,)."""

    def keys(self, recorder: Any, layouts: Sequence[Layout]) -> Sequence[Tensor | None]:
        """Keys of the candidates in the layer of the saliency, shape (n_candidates, heads, d_head).

        Asked for before :meth:`saliency`. None where a family does not give them.
        """
        return [None] * len(layouts)

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor | None:
        """Position ids that the kept tokens take along, int64, shape (n_axes, batch, n_tokens).

        None for models whose positions simply count tokens: theirs become compact.

        Args:
            inputs: what the model was called with.
            ids: the whole prompt, on the CPU, shape (batch, n_tokens).
            mask: its attention mask, on the CPU, same shape.
        """
        return None

    def placed(self, positions: Tensor, mask: Tensor) -> None:  # noqa: B027
        """Receive the positions that were kept, for models that derive later ones from them."""

    def release(self) -> None:  # noqa: B027
        """Put back what :meth:`placed` changed; called on detaching."""

    def boxes_on(self, layout: Layout, image_size: tuple[int, int]) -> Tensor:
        """Boxes of the candidates in a picture of a given size, before the processor changed it.

        Args:
            layout: of the picture.
            image_size: height and width of the picture in pixels.

        Returns:
            x0, y0, x1, y1 as fractions of its size in [0, 1], float32, shape (n_candidates, 4).
        """
        x0, y0, x1, y1 = self.view(image_size)
        scale = torch.tensor([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
        return (layout.boxes * scale + torch.tensor([x0, y0, x0, y0])).clamp(0, 1)

    def view(self, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of a picture that the encoder sees: x0, y0, x1, y1 as fractions of its size.

        Args:
            image_size: height and width of the picture in pixels.
        """
        return WHOLE


def tile_boxes(rows: int, columns: int, side: int) -> Tensor:
    """Boxes of a picture that is cut into tiles, tile by tile and row-major in each.

    Args:
        rows: tiles along the height.
        columns: tiles along the width.
        side: boxes along a side of each tile.

    Returns:
        x0, y0, x1, y1 as fractions of the picture, float32, shape (rows · columns · side², 4).
    """
    boxes = raster_boxes(rows * side, columns * side).view(rows, side, columns, side, 4)
    return boxes.transpose(1, 2).reshape(-1, 4)


def raster_boxes(rows: int, columns: int) -> Tensor:
    """Boxes of a raster in row-major order, float32, shape (rows · columns, 4)."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corners = (x / columns, y / rows, (x + 1) / columns, (y + 1) / rows)
    return torch.stack(corners, dim=-1).view(-1, 4)
