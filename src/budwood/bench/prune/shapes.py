"""Published shapes of every family, with random weights, for timing alone.

``shape_models`` builds the models, ``shape_pictures`` makes the pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from budwood.bench.prune import shape_models as models
from budwood.bench.prune import shape_pictures as pictures
from budwood.checks import need_at_least
from budwood.errors import InputError, UnknownNameError

_QUESTION = 24


@dataclass(frozen=True)
class Published:
    """A shape: how its model is built, and the picture that it is timed with.

    Attributes:
        family: its name in ``FAMILIES``.
        build: makes the model.
        picture: of a configuration, inputs of one picture and its part of the prompt.
        head: width of the LLM for each of its heads.
        vision_head: width of the tower for each of its heads.
        types: name of the token types, where the model takes them.
    """

    family: str
    build: Callable[[models.Size], Any]
    picture: Callable[[Any], pictures.Picture]
    head: int = 128
    vision_head: int = 64
    types: str | None = None


_QWEN = "mm_token_type_ids"

SHAPES = {
    "llava-1.5": Published("llava", models.llava, pictures.one_crop),
    "llava-next": Published("llava_next", models.llava_next, pictures.five_crops),
    "llava-onevision": Published(
        "llava_onevision", models.llava_onevision, pictures.five_crops, vision_head=72
    ),
    "pixtral": Published("llava-pixtral", models.pixtral, pictures.rows, head=160),
    "mistral3": Published("mistral3", models.mistral3, pictures.rows, head=160),
    "internvl3": Published("internvl", models.internvl, pictures.tiles_in_a_run),
    "idefics3": Published("idefics3", models.idefics3, pictures.marked_tiles, vision_head=72),
    "smolvlm2": Published(
        "smolvlm", models.smolvlm, pictures.marked_tiles, head=64, vision_head=72
    ),
    "gemma3": Published("gemma3", models.gemma3, pictures.pooled, 256, 72, "token_type_ids"),
    "paligemma": Published(
        "paligemma", models.paligemma, pictures.one_crop, 256, 72, "token_type_ids"
    ),
    "qwen2-vl": Published("qwen2_vl", models.qwen2_vl, pictures.patches, 128, 80, _QWEN),
    "qwen2.5-vl": Published("qwen2_5_vl", models.qwen2_5_vl, pictures.patches, 128, 80, _QWEN),
    "qwen3-vl": Published("qwen3_vl", models.qwen3_vl, pictures.patches, 128, 72, _QWEN),
    "qwen3-vl-moe": Published("qwen3_vl_moe", models.qwen3_vl_moe, pictures.patches, 64, 72, _QWEN),
}
"""Published shapes by name."""


def _published(name: str) -> Published:
    if name not in SHAPES:
        raise UnknownNameError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


@dataclass(frozen=True)
class Shape:
    """The size of a model of a published shape.

    Attributes:
        name: one of ``SHAPES``.
        layers: of the LLM; 32 in the published 7B models of LLaVA, 28 in Qwen2.5-VL.
        width: of the LLM, a multiple of the shape's ``head``; 4,096 in LLaVA, 3,584 in Qwen2.5-VL.
        vision_layers: of the tower, at least 2; 24 in LLaVA, 32 in Qwen2.5-VL.
        vision_width: of the tower, a multiple of the shape's ``vision_head``; 1,024 in LLaVA,
            1,280 in Qwen2.5-VL.

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
        published = _published(self.name)
        need_at_least(1, layers=self.layers)
        need_at_least(2, vision_layers=self.vision_layers)
        widths = (("width", published.head), ("vision_width", published.vision_head))
        for name, head in widths:
            given = getattr(self, name)
            need_at_least(1, **{name: given})
            if given % head:
                near = max(1, given // head) * head
                raise InputError(
                    f"{name}={given} must be a multiple of {head} in {self.name}; give {near}"
                )

    @classmethod
    def near(
        cls, name: str, layers: int, width: int, vision_layers: int, vision_width: int
    ) -> Shape:
        """A shape whose widths are rounded down to whole heads, at least one."""
        published = _published(name)
        heads = published.head, published.vision_head
        width, vision_width = (
            max(1, given // head) * head for given, head in zip((width, vision_width), heads)
        )
        return cls(name, layers, width, vision_layers, vision_width)

    @property
    def size(self) -> models.Size:
        """With the numbers of heads."""
        published = SHAPES[self.name]
        return models.Size(
            self.layers,
            self.width,
            self.width // published.head,
            self.vision_layers,
            self.vision_width,
            self.vision_width // published.vision_head,
        )


def random_model(
    shape: Shape, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """Build a model of a published shape, and a prompt with one picture.

    The picture is square: of the tower's own size, with four tiles more (LLaVA-NeXT and OneVision,
    InternVL) or sixteen (Idefics3, SmolVLM), or of 1,008 px where any size goes. So LLaVA-1.5 has
    576 visual tokens, LLaVA-NeXT 2,880, and Qwen2.5-VL 1,296.

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
            model = published.build(shape.size).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    picture, tokens = published.picture(model.config)
    start, end = torch.randint(8, models.IMAGE, (2, _QUESTION)).unbind()
    ids = torch.cat((start, torch.tensor(tokens), end))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
    if published.types is not None:
        inputs[published.types] = _types(model.config, ids)
    return model, {name: tensor.to(device) for name, tensor in inputs.items()}


def _types(config: Any, ids: torch.Tensor) -> torch.Tensor:
    """1 for placeholders; in PaliGemma 0 for the whole prompt, which sees itself both ways."""
    return (ids == models.IMAGE).int() * (config.model_type != "paligemma")
