"""Models of published shapes with random weights, for timing alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from budwood.errors import InputError, UnknownNameError

SHAPES = ("llava-next",)

_HEAD, _VISION_HEAD = 128, 64
_WORDS, _QUESTION = 32_064, 24


@dataclass(frozen=True)
class Shape:
    """How large a model of a published shape is to be.

    Attributes:
        name: one of ``SHAPES``.
        layers: of the LLM; 32 in the published 7B model.
        width: of the LLM, a multiple of 128; 4,096 there.
        vision_layers: of the tower, at least 2; 24 there.
        vision_width: of the tower, a multiple of 64; 1,024 there.

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
        if self.layers < 1 or self.vision_layers < 2:
            raise InputError(
                f"layers={self.layers} and vision_layers={self.vision_layers}; give at least 1 and "
                "at least 2"
            )
        widths = (("width", _HEAD), ("vision_width", _VISION_HEAD))
        for name, head in widths:
            if getattr(self, name) < head or getattr(self, name) % head:
                raise InputError(f"{name}={getattr(self, name)} must be a multiple of {head}")


def random_llava_next(
    shape: Shape, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Any]]:
    """LLaVA-NeXT with a CLIP-L/14 tower at 336 px, and a prompt with 2,880 visual tokens.

    A square picture of 672 px is five crops of 576 patches: an overview and 2 × 2 tiles.

    Args:
        shape: how large.
        seed: of weights, pixels and text.
        dtype: of the weights.

    Returns:
        The model, and inputs of one row.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    torch.manual_seed(seed)
    image_token = _WORDS - 1
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_width // _VISION_HEAD,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=_WORDS,
            hidden_size=shape.width,
            intermediate_size=round(shape.width * 2.6875),  # 11,008 at 4,096
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // _HEAD,
            num_key_value_heads=shape.width // _HEAD,
            max_position_embeddings=4096,
        ),
        image_token_index=image_token,  # the parameter's name; the attribute is image_token_id
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )
    model: Any = LlavaNextForConditionalGeneration(config)
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    n_image = 24 * 24 + 48 * (48 + 1)  # overview, and tiles with a newline after each row
    before, after = torch.randint(3, image_token, (2, _QUESTION)).unbind()
    ids = torch.cat((before, torch.full((n_image,), image_token), after))[None]
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 5, 3, 336, 336),
        "image_sizes": torch.tensor([[672, 672]]),
    }
