"""Models of published shapes with random weights, for timing alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.checks import need_at_least
from budwood.errors import InputError, UnknownNameError

_HEAD = 128
_WORDS, _QUESTION = 32_064, 24


@dataclass(frozen=True)
class Shape:
    """The size of a model of a published shape.

    Attributes:
        name: one of ``SHAPES``.
        layers: of the LLM; 32 in the published 7B models of LLaVA, 28 in Qwen2.5-VL.
        width: of the LLM, a multiple of 128; 4,096 in LLaVA, 3,584 in Qwen2.5-VL.
        vision_layers: of the tower, at least 2; 24 in LLaVA, 32 in Qwen2.5-VL.
        vision_width: of the tower, a multiple of 64 (Qwen2.5-VL: of 80); 1,024 in LLaVA, 1,280 in
            Qwen2.5-VL.

    Raises:
        UnknownNameError: an unknown name.
        InputError: a number is out of range.
    """

    name: str = "llava-next"
    layers: int = 4
    width: int = 2048
    vision_layers: int = 4
    vision_width: int = 1024

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise UnknownNameError(f"unknown shape {self.name!r}; known: {', '.join(SHAPES)}")
        need_at_least(1, layers=self.layers)
        need_at_least(2, vision_layers=self.vision_layers)
        widths = (("width", _HEAD), ("vision_width", self.vision_head))
        for name, head in widths:
            if getattr(self, name) < head or getattr(self, name) % head:
                raise InputError(f"{name}={getattr(self, name)} must be a multiple of {head}")

    @property
    def vision_head(self) -> int:
        """Width of a head of the tower."""
        return SHAPES[self.name].vision_head


@dataclass(frozen=True)
class _Published:
    """A shape: how its model is built, and the picture that it is timed with.

    Attributes:
        build: makes the model.
        picture: inputs of one picture, and the number of its placeholders.
        vision_head: width of a head of the tower.
    """

    build: Callable[[Shape], Any]
    picture: Callable[[Shape], tuple[dict[str, Tensor], int]]
    vision_head: int = 64


def random_model(
    shape: Shape, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """Build a model of a published shape, and a prompt with one picture.

    LLaVA-1.5 has 576 visual tokens; LLaVA-NeXT 2,880, of five crops of 576: a square picture of
    672 px; Qwen2.5-VL 1,296, of a square picture of 1,008 px.

    Args:
        shape: how large.
        seed: of weights, pixels and text.
        dtype: of the weights.
        device: where both are made.

    Returns:
        The model, and inputs of one row.
    """
    published = SHAPES[shape.name]
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 7B parameters need not be made in float32 first
    try:
        with torch.device(device):
            model = published.build(shape).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    picture, n_image = published.picture(shape)
    image_token = model.config.image_token_id
    start, end = torch.randint(8, _WORDS - 8, (2, _QUESTION)).unbind()
    ids = torch.cat((start, torch.full((n_image,), image_token), end))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
    if "image_grid_thw" in picture:
        inputs["mm_token_type_ids"] = (ids == image_token).int()
    return model, {name: tensor.to(device) for name, tensor in inputs.items()}


def _clip(shape: Shape) -> Any:
    """CLIP-L/14 at 336 px."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_width // shape.vision_head,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llama(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=shape.width,
        intermediate_size=round(shape.width * 2.6875),  # 11,008 at 4,096
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // _HEAD,
        num_key_value_heads=shape.width // _HEAD,
        max_position_embeddings=4096,
    )


def _llava(shape: Shape) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_clip(shape), text_config=_llama(shape), image_token_index=_WORDS - 1
        )
    )


def _llava_next(shape: Shape) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=_clip(shape),
            text_config=_llama(shape),
            image_token_index=_WORDS - 1,
            image_grid_pinpoints=pinpoints,
        )
    )


def _qwen2_5_vl(shape: Shape) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    n_heads = shape.width // _HEAD
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_width,
        "intermediate_size": round(shape.vision_width * 2.671875),  # 3,420 at 1,280
        "num_heads": shape.vision_width // shape.vision_head,
        "out_hidden_size": shape.width,
        "fullatt_block_indexes": list(range(shape.vision_layers - 1, 0, -8)),
    }
    text = {
        "vocab_size": _WORDS,
        "hidden_size": shape.width,
        "intermediate_size": round(shape.width * 5.2857142857),  # 18,944 at 3,584
        "num_hidden_layers": shape.layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": 4 if n_heads % 4 == 0 else 1,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    tokens = {
        "image_token_id": _WORDS - 1,
        "video_token_id": _WORDS - 2,
        "vision_start_token_id": _WORDS - 3,
        "vision_end_token_id": _WORDS - 4,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
    )


def _one_crop(_: Shape) -> tuple[dict[str, Tensor], int]:
    return {"pixel_values": torch.randn(1, 3, 336, 336)}, 24 * 24


def _five_crops(_: Shape) -> tuple[dict[str, Tensor], int]:
    pixels = torch.randn(1, 5, 3, 336, 336)
    # The overview, and tiles with a newline after each row.
    n_image = 24 * 24 + 48 * (48 + 1)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]])}, n_image


def _patches(_: Shape) -> tuple[dict[str, Tensor], int]:
    side = 72
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, side, side]])
    return {"pixel_values": pixels, "image_grid_thw": grid}, side * side // 4


SHAPES = {
    "llava-1.5": _Published(_llava, _one_crop),
    "llava-next": _Published(_llava_next, _five_crops),
    "qwen2.5-vl": _Published(_qwen2_5_vl, _patches, vision_head=80),
}
"""Published shapes by name."""
