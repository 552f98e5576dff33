"""Tiny random models of every family, and batches for them, all of unequal sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

PAD, BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO = range(7)
VOCABULARY = 61
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    **IDS,
}
CLIP = {
    "hidden_size": 30,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "image_size": 12,
    "patch_size": 3,
    "initializer_range": 0.3,
    "initializer_factor": 1.0,
    "projection_dim": 8,
}
SIGLIP = {name: CLIP[name] for name in CLIP if name not in ("projection_dim", "initializer_factor")}


@dataclass(frozen=True)
class Video:
    """A video in a row of a batch."""

    seed: int


@dataclass(frozen=True)
class Case:
    """A model and how to make inputs for it.

    `image(seed)` gives one image's inputs and its number of placeholders, or its tokens where
    others stand between; the size depends on the seed where the family allows. `join` puts several
    together. A family whose images depend on their row has `image_in(seed, n_in_row)` and
    `join_rows`, which gets a list a row, in place of these. `pixels_of(batch, row, images)` takes a
    row's inputs out of a batch where it is not one entry an image. `video(seed)` gives one video's
    inputs and its part of the prompt. `kinds` makes token types, under the name `types`, of ids and
    of which tokens come after the prompt. `masks` makes of a row's token types, by hand, what its
    language model takes as a mask.
    """

    model: Any
    image: Callable[[int], tuple[dict[str, Tensor], int | list[int]]]
    join: Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    video: Callable[[int], tuple[dict[str, Tensor], list[int]]] | None = None
    image_in: Callable[[int, int], tuple[dict[str, Tensor], int]] | None = None
    join_rows: Callable[[Sequence[Sequence[dict[str, Tensor]]]], dict[str, Tensor]] | None = None
    pixels_of: Callable[[dict[str, Tensor], int, slice], dict[str, Tensor]] | None = None
    types: str | None = None
    kinds: Callable[[Tensor, Tensor], Tensor] = lambda ids, suffix: by_token(ids)
    masks: Callable[[Tensor], Any] = lambda kinds: torch.ones(1, len(kinds), dtype=torch.long)
    bidirectional: bool = False

    @property
    def llm(self) -> Any:
        """The language model inside."""
        inner = self.model.model
        return inner.text_model if hasattr(inner, "text_model") else inner.language_model

    @property
    def tower(self) -> str:
        """Name of the vision tower inside."""
        names = ("visual", "vision_tower", "vision_model")
        return next(name for name in names if hasattr(self.model.model, name))

    def typed(self, ids: Tensor, suffix: Tensor | int | None = None) -> dict[str, Tensor]:
        """Token types of `ids`, whose suffix is a mask or begins at a position."""
        if self.types is None:
            return {}
        if not isinstance(suffix, Tensor):
            columns = torch.arange(ids.shape[1]).expand_as(ids)
            suffix = columns >= (ids.shape[1] if suffix is None else suffix)
        return {self.types: self.kinds(ids, suffix)}

    def batch(
        self, *rows: Sequence[int | Video | list[int]], side: str = "left"
    ) -> dict[str, Tensor]:
        """Rows of text (lists of ids), images (seeds) and videos, padded on `side`."""
        images, videos, texts = [], [], []
        for row in rows:
            text: list[int] = [BOS]
            images.append([])
            n_images = sum(isinstance(part, int) for part in row)
            for part in row:
                if isinstance(part, list):
                    text += part
                elif isinstance(part, Video):
                    assert self.video is not None
                    inputs, placeholders = self.video(part.seed)
                    videos.append(inputs)
                    text += placeholders
                else:
                    given = self.image_in(part, n_images) if self.image_in else self.image(part)
                    inputs, tokens = given
                    images[-1].append(inputs)
                    tokens = [IMAGE] * tokens if isinstance(tokens, int) else tokens
                    text += [*self.before, *tokens, *self.after]
            texts.append(text)
        length = max(map(len, texts))
        padded = [pad(text, length, PAD, side) for text in texts]
        masks = [pad([1] * len(text), length, 0, side) for text in texts]
        ids = torch.tensor(padded)
        batch = {"input_ids": ids, "attention_mask": torch.tensor(masks)}
        batch |= self.typed(ids)
        every = [inputs for row in images for inputs in row]
        if every:
            batch |= self.join_rows(images) if self.join_rows else self.join(every)
        return batch | (concatenate(videos) if videos else {})


def by_token(ids: Tensor) -> Tensor:
    """1 for placeholders of images, 2 for those of videos."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def pad(row: list[int], length: int, value: int, side: str) -> list[int]:
    padding = [value] * (length - len(row))
    return padding + row if side == "left" else row + padding


def words(n_words: int, seed: int) -> list[int]:
    """Ids of ordinary words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VIDEO + 1, VOCABULARY, (n_words,), generator=generator).tolist()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(model: Any) -> Any:
    model.generation_config.eos_token_id = None  # so that answers have full length
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    with torch.no_grad():  # so that answers hold no placeholders, which no model can be fed back
        model.lm_head.weight[: VIDEO + 1] = 0
    return model.eval()


def llava(**changes: Any) -> Case:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        **changes,
    )
    n_tokens = 17 if changes.get("vision_feature_select_strategy") == "full" else 16
    return Case(
        ready(LlavaForConditionalGeneration(config)),
        lambda seed: ({"pixel_values": noise(seed, 1, 3, 12, 12)}, n_tokens),
        concatenate,
    )


def llava_siglip() -> Case:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
    )
    return Case(
        ready(LlavaForConditionalGeneration(config)),
        lambda seed: ({"pixel_values": noise(seed, 1, 3, 12, 12)}, 16),
        concatenate,
    )


NEXT_SIZES = [(11, 37), (41, 9), (30, 28)]
"""Heights and widths: two crops side by side, two above each other, four."""


def llava_next() -> Case:
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
    )
    model = ready(LlavaNextForConditionalGeneration(config))

    def image(seed: int) -> tuple[dict[str, Tensor], int]:
        size = torch.tensor([NEXT_SIZES[seed % 3]])
        n_crops = 5 if seed % 3 == 2 else 3
        pixels = {"pixel_values": noise(seed, 1, n_crops, 3, 12, 12), "image_sizes": size}
        empty = [torch.zeros(n_crops, 16, 1)]
        _, n_tokens = model.pack_image_features(empty, size, "default", torch.zeros(1))
        return pixels, int(n_tokens)

    return Case(model, image, join_next)


def llava_onevision() -> Case:
    """Rasters of more than two crops are shrunk; images that share a row are one square each."""
    torch.manual_seed(0)
    vision = {key: CLIP[key] for key in CLIP if key not in ("projection_dim", "initializer_factor")}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
        vision_aspect_ratio="anyres_max_2",
    )
    model = ready(LlavaOnevisionForConditionalGeneration(config))

    def image(seed: int, n_in_row: int) -> tuple[dict[str, Tensor], int]:
        size = torch.tensor([NEXT_SIZES[seed % 3]])
        n_crops = 1 if n_in_row > 1 else 5 if seed % 3 == 2 else 3
        pixels = {"pixel_values": noise(seed, 1, n_crops, 3, 12, 12), "image_sizes": size}
        return pixels, len(onevision_places(model, size[0], n_crops))

    def join_rows(rows: Sequence[Sequence[dict[str, Tensor]]]) -> dict[str, Tensor]:
        joined = join_next([inputs for row in rows for inputs in row])
        counts = [len(row) for row in rows if row]
        return joined | {"batch_num_images": torch.tensor(counts)}

    def pixels_of(batch: dict[str, Tensor], row: int, images: slice) -> dict[str, Tensor]:
        names = ("pixel_values", "image_sizes")
        count = torch.tensor([images.stop - images.start])
        return {name: batch[name][images] for name in names} | {"batch_num_images": count}

    def video(seed: int) -> tuple[dict[str, Tensor], list[int]]:
        return {"pixel_values_videos": noise(40 + seed, 1, 3, 3, 12, 12)}, [VIDEO] * (3 * 2 * 2 + 1)

    return Case(
        model,
        lambda seed: image(seed, 1),
        join_next,
        video=video,
        image_in=image,
        join_rows=join_rows,
        pixels_of=pixels_of,
    )


def onevision_places(model: Any, size: Tensor, n_crops: int) -> Tensor:
    """Whether the model's own packing has a patch (1) or a newline (-1) at each place."""
    packed, _ = model.model.pack_image_features(
        [torch.ones(n_crops, 16, 1)], size[None], -torch.ones(1), model.config.vision_aspect_ratio
    )
    return packed[0].flatten()


TILES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 18,
    "patch_size": 3,
    "initializer_range": 0.3,
}
FAKE, TILE, BREAK = VISION_START, VISION_END, VOCABULARY - 1
"""Markers of Idefics3: around images, of one tile, and a line break, which is an ordinary word."""


def idefics3() -> Case:
    return marked(Idefics3Config, Idefics3ForConditionalGeneration, 3, [(1, 2), (3, 1), (2, 2)])


def smolvlm() -> Case:
    return marked(SmolVLMConfig, SmolVLMForConditionalGeneration, 2, [(2, 1), (0, 0), (1, 3)])


def marked(
    config_class: Any, model_class: Any, scale: int, grids: Sequence[tuple[int, int]]
) -> Case:
    """Tiles with markers; no tiles but the overview where the grid is (0, 0)."""
    torch.manual_seed(0)
    config = config_class(
        vision_config=TILES,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=scale,
    )
    per_tile = (6 // scale) ** 2

    def image(seed: int) -> tuple[dict[str, Tensor], list[int]]:
        rows, columns = grids[seed % 3]
        tile = [FAKE, TILE, *[IMAGE] * per_tile]
        tokens = [*(tile * columns), BREAK] * rows
        tokens += [*[BREAK] * (rows > 0), *tile, FAKE]
        return {"pixel_values": noise(seed, 1, rows * columns + 1, 3, 18, 18)}, tokens

    def join_rows(rows: Sequence[Sequence[dict[str, Tensor]]]) -> dict[str, Tensor]:
        of_rows = [
            torch.cat([inputs["pixel_values"] for inputs in row], dim=1)
            if row
            else torch.zeros(1, 1, 3, 18, 18)
            for row in rows
        ]
        pixels = join_next([{"pixel_values": tiles} for tiles in of_rows])["pixel_values"]
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": (pixels != 0)
            .any(2)
            .any(-1, True)
            .any(-2, True)
            .expand(*pixels.shape[:2], 18, 18)
            .long(),
        }

    def pixels_of(batch: dict[str, Tensor], row: int, images: slice) -> dict[str, Tensor]:
        names = ("pixel_values", "pixel_attention_mask")
        return {name: batch[name][row : row + 1] for name in names}

    return Case(
        ready(model_class(config)), image, concatenate, join_rows=join_rows, pixels_of=pixels_of
    )


INTERNVL_TILES = (3, 1, 7)
"""Tiles of each image, with its overview: one row of two, one tile, two rows of three."""


def internvl() -> Case:
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=TILES | {"use_qk_norm": True, "layer_scale_init_value": 1.0},
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )
    model = ready(InternVLForConditionalGeneration(config))
    with torch.no_grad():
        model.model.vision_tower.embeddings.cls_token.normal_()
        model.model.vision_tower.embeddings.position_embeddings.normal_()

    def image(seed: int) -> tuple[dict[str, Tensor], list[int]]:
        n_tiles = INTERNVL_TILES[seed % 3]
        tokens = [VISION_START, *[IMAGE] * 9 * n_tiles, VISION_END]
        return {"pixel_values": noise(seed, n_tiles, 3, 18, 18)}, tokens

    def pixels_of(batch: dict[str, Tensor], row: int, images: slice) -> dict[str, Tensor]:
        per_row = (batch["input_ids"] == IMAGE).sum(1) // 9
        ends = [0, *per_row.cumsum(0).tolist()]
        return {"pixel_values": batch["pixel_values"][ends[row] : ends[row + 1]]}

    return Case(model, image, concatenate, pixels_of=pixels_of)


QWEN_VISION = {
    "depth": 4,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_heads": 3,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "initializer_range": 0.3,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_TEXT = TEXT | {"rope_parameters": MROPE}


def qwen2_vl() -> Case:
    torch.manual_seed(0)
    vision = QWEN_VISION | {"embed_dim": 24, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=QWEN_TEXT, **QWEN_IDS)
    return qwen(Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl() -> Case:
    torch.manual_seed(0)
    vision = QWEN_VISION | {"window_size": 12, "fullatt_block_indexes": [0, 2]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=QWEN_TEXT, **QWEN_IDS)
    return qwen(Qwen2_5_VLForConditionalGeneration(config), {"second_per_grid_ts": (0.5, 2.0, 1.0)})


QWEN3_VISION = QWEN_VISION | {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 25}
QWEN3_TEXT = QWEN_TEXT | {"head_dim": 8}


def qwen3_vl() -> Case:
    torch.manual_seed(0)
    config = Qwen3VLConfig(vision_config=QWEN3_VISION, text_config=QWEN3_TEXT, **QWEN_IDS)
    return qwen(Qwen3VLForConditionalGeneration(config), timestamps=True)


def qwen3_vl_moe() -> Case:
    torch.manual_seed(0)
    text = QWEN3_TEXT | {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    }
    config = Qwen3VLMoeConfig(vision_config=QWEN3_VISION, text_config=text, **QWEN_IDS)
    return qwen(Qwen3VLMoeForConditionalGeneration(config), timestamps=True)


def qwen(
    model: Any, per_video: dict[str, Sequence[float]] | None = None, timestamps: bool = False
) -> Case:
    """A Qwen-VL model; its videos have timestamps between frames, or other inputs beside them."""
    n_values = 3 * 2 * 2 * 2

    def image(seed: int) -> tuple[dict[str, Tensor], int]:
        height, width = [(10, 14), (6, 8), (16, 10)][seed % 3]
        inputs = {
            "pixel_values": noise(seed, height * width, n_values),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
        return inputs, height * width // 4

    def video(seed: int) -> tuple[dict[str, Tensor], list[int]]:
        frames, height, width = [(3, 6, 10), (2, 10, 4), (4, 8, 6)][seed % 3]
        inputs = {
            "pixel_values_videos": noise(40 + seed, frames * height * width, n_values),
            "video_grid_thw": torch.tensor([[frames, height, width]]),
        }
        for name, values in (per_video or {}).items():
            inputs[name] = torch.tensor([values[seed % 3]])
        n_tokens = height * width // 4
        if not timestamps:
            return inputs, [VISION_START, *[VIDEO] * (frames * n_tokens), VISION_END]
        ids = [VISION_START]
        for frame in range(frames):
            ids += [
                *words(1 + frame % 2, 70 + frame),
                VISION_START,
                *[VIDEO] * n_tokens,
                VISION_END,
            ]
        return inputs, [*ids, VISION_END]

    return Case(ready(model), image, concatenate, **WRAPPED, video=video, types="mm_token_type_ids")


WRAPPED = {"before": (VISION_START,), "after": (VISION_END,)}
GEMMA = {**TEXT, "head_dim": 8, "pad_token_id": PAD}


def gemma3() -> Case:
    """Patches pooled 2×2, and two layers with a sliding window that is shorter than the prompts."""
    torch.manual_seed(0)
    window, layers = 9, ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SIGLIP | {"image_size": 24, "vision_use_head": False}),
        text_config=Gemma3TextConfig(
            **GEMMA, sliding_window=window, layer_types=layers, query_pre_attn_scalar=8
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # it starts at zero
        weight = model.model.multi_modal_projector.mm_input_projection_weight
        weight.copy_(noise(1, *weight.shape))

    def masks(kinds: Tensor) -> dict[str, Tensor]:
        full = torch.zeros(len(kinds), len(kinds), dtype=torch.bool)
        near = full.clone()
        for query in range(len(kinds)):
            for key in range(len(kinds)):
                between = kinds[min(query, key) : max(query, key) + 1]
                full[query, key] = key <= query or bool((between == 1).all())
                near[query, key] = full[query, key] and key > query - window
        return {"full_attention": full[None, None], "sliding_attention": near[None, None]}

    return Case(
        ready(model),
        lambda seed: ({"pixel_values": noise(seed, 1, 3, 24, 24)}, 16),
        concatenate,
        **WRAPPED,
        types="token_type_ids",
        masks=masks,
        bidirectional=True,
    )


def paligemma(text: Any = None) -> Case:
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP | {"vision_use_head": False}),
        text_config=text or GemmaConfig(**GEMMA),
        image_token_index=IMAGE,
        projection_dim=TEXT["hidden_size"],
    )

    def masks(kinds: Tensor) -> Tensor:
        seen = torch.zeros(len(kinds), len(kinds), dtype=torch.bool)
        for query in range(len(kinds)):
            for key in range(len(kinds)):
                seen[query, key] = key <= query or bool(kinds[query] == 0 and kinds[key] == 0)
        return seen[None, None]

    return Case(
        ready(PaliGemmaForConditionalGeneration(config)),
        lambda seed: ({"pixel_values": noise(seed, 1, 3, 12, 12)}, 16),
        concatenate,
        types="token_type_ids",
        kinds=lambda ids, suffix: suffix.int(),
        masks=masks,
        bidirectional=True,
    )


PIXTRAL = {**SIGLIP, "hidden_size": 24, "num_attention_heads": 3, "image_size": 36}
ROW_END, IMAGE_END = VISION_START, VISION_END


def llava_pixtral() -> Case:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**PIXTRAL),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return rows_of(ready(LlavaForConditionalGeneration(config)), 1)


def mistral3() -> Case:
    """Patches merged 2×2, of a layer that is not the last."""
    torch.manual_seed(0)
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**PIXTRAL),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-2,
    )
    return rows_of(ready(Mistral3ForConditionalGeneration(config)), 2)


def rows_of(model: Any, merge: int) -> Case:
    """Images of three sizes, a break after each row of tokens and an end after the last."""

    def image(seed: int) -> tuple[dict[str, Tensor], list[int]]:
        rows, columns = [(5, 7), (3, 4), (8, 5)][seed % 3]
        height, width = 3 * merge * rows, 3 * merge * columns
        inputs = {
            "pixel_values": noise(seed, 1, 3, height, width),
            "image_sizes": torch.tensor([[height, width]]),
        }
        return inputs, [*([*[IMAGE] * columns, ROW_END] * rows)[:-1], IMAGE_END]

    return Case(model, image, join_padded)


def join_padded(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad all pixels to the largest height and width."""
    sides = torch.cat([image["image_sizes"] for image in images]).amax(0).tolist()
    for image in images:
        height, width = image["image_sizes"][0].tolist()
        padding = (0, sides[1] - width, 0, sides[0] - height)
        image["pixel_values"] = torch.nn.functional.pad(image["pixel_values"], padding)
    return concatenate(images)


def concatenate(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([image[name] for image in images]) for name in images[0]}


def join_next(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    n_crops = max(image["pixel_values"].shape[1] for image in images)
    for image in images:
        missing = n_crops - image["pixel_values"].shape[1]
        padding = (0, 0) * 3 + (0, missing)
        image["pixel_values"] = torch.nn.functional.pad(image["pixel_values"], padding)
    return concatenate(images)


BUILDERS: dict[str, Callable[[], Case]] = {
    "gemma3": gemma3,
    "llava": llava,
    "llava-pixtral": llava_pixtral,
    "llava_next": llava_next,
    "mistral3": mistral3,
    "paligemma": paligemma,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
}

WITH_VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision")
"""Families that prune videos."""

ROW_IMAGES = [slice(0, 2), slice(2, 2), slice(2, 3)]
"""Images of each row of the `batch` fixture."""
