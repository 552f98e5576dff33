"""PaliGemma and Gemma 3: one SigLIP tower, one square of tokens per picture or crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool2d

from budwood.errors import AttachError
from budwood.prune.families.base import Family, Layout, one_by_one, raster_boxes
from budwood.prune.families.towers import Tower, refuse_tower
from budwood.prune.saliency import Recorder


class PaliGemma(Family):
    """``PaliGemmaForConditionalGeneration`` (PaliGemma 1 and 2).

    Saliency is the mean attention received in the tower's last layer, whose output is projected.
    This is budwood's choice: the tower has no [CLS].
    """

    model_type: ClassVar[str] = "paligemma"
    encoder_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def __init__(self, model: Any, processor: Any = None, whole_crops: bool = False) -> None:
        super().__init__(model, processor, whole_crops)
        refuse_tower(model, "siglip_vision_model")
        self.tower = Tower(model)

    def refuse_later(self, n_rows: int) -> None:
        raise AttachError(
            "paligemma reads a prompt forwards and backwards, so a new image changes what "
            "past_key_values holds; start from an empty cache"
        )

    @property
    def pool(self) -> int:
        """Patches along a side of the square that becomes one token."""
        return 1

    def recorder(self, inputs: Mapping[str, Any]) -> Recorder:
        return self.tower.recorder(inputs)

    def outputs(self, features: Sequence[Tensor]) -> Any:
        # The models take one tensor, (n_images, n_tokens, d_model), and images may differ in what
        # they keep.
        return one_by_one(features)

    def layouts(self, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        side = self.tower.side // self.pool
        seen = side * self.pool / self.tower.side  # pooling leaves out what fills no square
        layout = Layout(side * side, seen * raster_boxes(side, side), grid=(side, side))
        return [layout] * len(features)

    def saliency(self, recorder: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        side = self.tower.side
        patches = recorder.saliency().view(-1, 1, side, side)
        return list(avg_pool2d(patches, self.pool).flatten(1))

    def keys(self, recorder: Any, layouts: Sequence[Layout]) -> Sequence[Tensor | None]:
        keys, side = recorder.keys(), self.tower.side
        patches = keys.flatten(2).transpose(1, 2).unflatten(-1, (side, side))
        pooled = avg_pool2d(patches, self.pool).flatten(2).transpose(1, 2)
        return list(pooled.unflatten(-1, keys.shape[2:]))


class Gemma3(PaliGemma):
    """``Gemma3ForConditionalGeneration``; crops of pan-and-scan are images of their own.

    Saliency of a token is the mean over the patches that the model pools into it.
    """

    model_type: ClassVar[str] = "gemma3"

    def refuse_later(self, n_rows: int) -> None:
        if n_rows > 1:
            raise AttachError(
                f"gemma3's sliding windows would count the padding between turns of {n_rows} rows; "
                "give a turn with a new image one row at a time, or start from an empty cache"
            )

    @property
    def pool(self) -> int:
        return self.model.model.multi_modal_projector.kernel_size
