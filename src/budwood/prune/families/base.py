"""The interface of a model family: where things are in a model. No mathematics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from budwood.errors import AttachError
from budwood.prune.saliency import Recorder

_PER_IMAGE = ("image_sizes",)
"""Inputs with one entry per image that may come as lists."""

Placing: TypeAlias = Callable[[tuple[int, int]], Tensor]
"""Height and width of a picture in pixels → x0, y0, x1, y1 of each candidate as fractions of its
size in [0, 1], float32, shape (n_candidates, 4)."""

_WRAPPING = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_index",
    "eoi_token_index",
)
"""Names that configurations give to the tokens of images and around them."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of one image are. On the CPU, and shared between images of equal size.

    *Candidates* are the tokens that a method chooses from; the others, such as newlines, stay.

    Attributes:
        n_placeholders: tokens that the image takes in the prompt.
        boxes: x0, y0, x1, y1 of each candidate in the picture (the frame, for a video) that the
            encoder sees, as fractions of its width and height in [0, 1], float32, shape
            (n_candidates, 4).
        candidates: features that may be dropped, in the LLM's order, int64, shape
            (n_candidates,); None if all may.
        fixed: features that always stay, int64, shape (n_fixed,).
        order: place of each candidate in the encoder's order, int64, shape (n_candidates,), or
            (n_candidates, n_parts) if it is made of several; None if the LLM has the same order.
        weights: how much each part counts, float32, shape (n_candidates, n_parts); None if all
            count the same.
        grid: rows and columns of the candidates, of each frame, if they form one raster; else None.
        n_crops: crops of equal size that the encoder saw.
        frames: frames of a video, one after the other in the candidates, each as long as the next.
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
    frames: int = 1
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

    def kept(self, indices: Tensor) -> Tensor:
        """Features that go to the LLM: the chosen candidates and those that always stay.

        Args:
            indices: chosen candidates, increasing, int64, shape (n_kept,), on any device.

        Returns:
            Increasing, on the same device, int64, shape (n_kept + n_fixed,).
        """
        if self.candidates is None:
            return indices
        chosen = self.candidates.to(indices.device, non_blocking=True)[indices]
        fixed = self.fixed.to(indices.device, non_blocking=True)
        return torch.cat((chosen, fixed)).sort().values

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


class Visuals(ABC):
    """The images, or the videos, that a model is called with: their inputs, features and places.

    A video is one visual: its frames have one layout, and share one budget.

    Attributes:
        kind: ``"image"`` or ``"video"``, as ``mm_encoder_outputs`` calls it.
        pixels: the input that says that there are some.
        encoder_inputs: inputs that encoding consumes; the LLM does not see them.
        patches: how patches that become one token make its saliency, one of ``PATCH_SCORES``.
    """

    kind: str = "image"
    pixels: str = "pixel_values"
    encoder_inputs: tuple[str, ...]
    patches: str = "mean"

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def token_id(self) -> int:
        """The placeholder in the prompt that each visual token replaces."""
        return getattr(self.model.config, f"{self.kind}_token_id")

    def given(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call has any."""
        pixels = inputs.get(self.pixels)
        return pixels is not None and len(pixels) > 0

    @abstractmethod
    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        """Make hooks for the layer whose attention is the saliency; they last one encoder run."""

    def features(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Encode: projected features, one tensor per visual, shape (n_features, d_model).

        Models whose LLM takes several levels (deepstack) have shape (n_features, n_levels, d_model)
        with the input embeddings as the first level, which is the one that is chosen by.
        """
        return list(self.encode(inputs).pooler_output)

    def encode(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model's own encoder and projector."""
        given = {name: inputs[name] for name in self.encoder_inputs if name in inputs}
        return getattr(self.model, f"get_{self.kind}_features")(**given, return_dict=True)

    def outputs(self, features: Sequence[Tensor]) -> Any:
        """What ``generate`` and ``forward`` take in ``mm_encoder_outputs``: visuals encoded before.

        Args:
            features: as :meth:`features` gives them, or a part of each.
        """
        given: Any = list(features)
        return BaseModelOutputWithPooling(pooler_output=given)

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The pixels that identify each visual, one tensor per visual."""
        return list(inputs[self.pixels])

    def only(self, inputs: Mapping[str, Any], which: Sequence[int]) -> dict[str, Any]:
        """The encoder's inputs of some visuals, given those of all.

        Args:
            inputs: what the model was called with.
            which: their numbers among the visuals of ``inputs``.

        Raises:
            AttachError: an input does not have one entry per visual.
        """
        n_given, some = len(self.pictures(inputs)), {}
        for name in self.encoder_inputs:
            value = inputs.get(name)
            if value is None or not (isinstance(value, Tensor) or name in _PER_IMAGE):
                continue  # an option of the encoder
            if len(value) != n_given:
                raise AttachError(
                    f"{name} has {len(value)} entries for {n_given} {self.kind}s, so the new ones "
                    f"cannot be told from those in past_key_values; give only the new {self.kind}s"
                )
            some[name] = (
                value[list(which)] if isinstance(value, Tensor) else [value[i] for i in which]
            )
        return some

    def extent(self, row: Tensor, start: int, stop: int) -> tuple[int, int]:
        """Where a visual begins and ends with the text that is a part of it, such as timestamps.

        Args:
            row: one row of the prompt, int64, on the CPU, shape (n_tokens,).
            start: position of its first placeholder.
            stop: position after its last.
        """
        return start, stop

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Say where the tokens of each visual are."""

    @abstractmethod
    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Saliency of the candidates, one float32 tensor per visual, shape (n_candidates,)."""

    def keys(self, recorder: Any, layouts: Sequence[Layout]) -> Sequence[Tensor | None]:
        """Keys of the candidates in the layer of the saliency, shape (n_candidates, heads, d_head).

        Asked for before :meth:`saliency`. None where a family does not give them.
        """
        return [None] * len(layouts)

    def placing(self, layout: Layout) -> Placing:
        """Boxes of the candidates in a picture or frame before the processor changed it.

        Reports keep what is returned, so it must not hold the model, and be picklable.

        Args:
            layout: of the image or video.
        """
        return partial(unmoved, layout.boxes)


class Family(Visuals):
    """Where a model of one ``config.model_type`` keeps what pruning needs; itself for its images.

    Subclasses know names and orders. Scores, choices and prompts are not their business.

    Attributes:
        model_type: the ``config.model_type`` that it is for.
        videos: the same for videos; None where they are not pruned.
        has_whole_crops: it can give whole crops, as published LLaVA code does.
        merges_patches: it merges patches into one token, and knows all ``PATCH_SCORES``.
        has_coordinates: :meth:`positions` gives some.

    Args:
        model: a transformers model for conditional generation.
        processor: its processor, if there is one at hand; only :meth:`placing` reads it.
        whole_crops: give all crops one after the other, without unpadding or newlines.

    Raises:
        UnsupportedModelError: a part of the model is of a kind that the family does not know.
    """

    model_type: ClassVar[str]
    has_whole_crops: ClassVar[bool] = False
    merges_patches: ClassVar[bool] = False
    has_coordinates: ClassVar[bool] = False

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model)
        self.processor = processor
        self.whole_crops = whole_crops
        self.videos: Visuals | None = None

    @property
    def image_token_id(self) -> int:
        """The placeholder of an image in the prompt."""
        return self.token_id

    @property
    def kinds(self) -> list[Visuals]:
        """The images, and the videos if they are pruned."""
        return [self] if self.videos is None else [self, self.videos]

    def visuals(self, inputs: Mapping[str, Any]) -> list[Visuals]:
        """What a call has to prune: images, videos, or both."""
        return [visuals for visuals in self.kinds if visuals.given(inputs)]

    def without_pictures(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call without what goes to the vision encoder."""
        consumed = {name for kind in self.kinds for name in kind.encoder_inputs}
        return {name: value for name, value in inputs.items() if name not in consumed}

    def has_whole_video(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call has a video that goes to the LLM unpruned."""
        return self.videos is None and inputs.get("pixel_values_videos") is not None

    @property
    def wrapping_ids(self) -> frozenset[int]:
        """Special tokens around an image. They are not text and do not end a turn."""
        return wrapping_ids(self.model.config)

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor | None:
        """Position ids that the kept tokens take along, int64, shape (n_axes, batch, n_tokens).

        None for models whose positions simply count tokens.

        Args:
            inputs: what the model was called with.
            ids: the whole prompt, on the CPU, shape (batch, n_tokens).
            mask: its attention mask, on the CPU, same shape.
        """
        return None

    def refuse_later(self, n_rows: int) -> None:
        """Refuse new images behind a cache where they are not read as in one prompt.

        Args:
            n_rows: of the batch.

        Raises:
            AttachError: it would not.
        """

    def placed(self, positions: Tensor, mask: Tensor) -> None:
        """Receive the positions that were kept, for models that derive later ones from them."""

    def release(self) -> None:
        """Put back what :meth:`placed` changed; called on detaching."""


def unmoved(boxes: Tensor, _image_size: tuple[int, int]) -> Tensor:
    """Boxes in a picture that the encoder sees whole."""
    return boxes.clamp(0, 1)


def wrapping_ids(config: Any) -> frozenset[int]:
    """Special tokens around the images of a model with this configuration."""
    ids = (getattr(config, name, None) for name in _WRAPPING)
    return frozenset(i for i in ids if i is not None)


def one_by_one(features: Sequence[Tensor]) -> BaseModelOutputWithPooling:
    """Kept features for models that take one tensor for all visuals, whose first axis counts these.

    Each token counts as a visual by itself. ``generate`` then tells the rows of a batch apart where
    it repeats features for beams.

    Args:
        features: one tensor per visual, shape (n_kept, d_model).
    """
    return BaseModelOutputWithPooling(pooler_output=torch.cat(list(features))[:, None])


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
