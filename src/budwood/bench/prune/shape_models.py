"""Models with random weights, each after a published one. How large is for the caller to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

WORDS = 32_064
"""Size of the vocabulary; the last eight are no words."""
IMAGE, VIDEO, START, END, FAKE, TILE, BREAK = range(WORDS - 8, WORDS - 1)


@dataclass(frozen=True)
class Size:
    """What scales a model.

    Attributes:
        layers: of the LLM.
        width: of the LLM.
        heads: of the LLM.
        vision_layers: of the tower.
        vision_width: of the tower.
        vision_heads: of the tower.
    """

    layers: int
    width: int
    heads: int
    vision_layers: int
    vision_width: int
    vision_heads: int


def llava(size: Size) -> Any:
    """LLaVA-1.5-7B: CLIP-L/14 at 336 px and Vicuna."""
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=_clip(size), text_config=_llama(size), image_token_index=IMAGE
        )
    )


def llava_next(size: Size) -> Any:
    """LLaVA-NeXT-7B: as LLaVA-1.5, with up to four tiles."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=_clip(size),
            text_config=_llama(size),
            image_token_index=IMAGE,
            image_grid_pinpoints=pinpoints,
        )
    )


def llava_onevision(size: Size) -> Any:
    """LLaVA-OneVision-7B: SigLIP-so400m/14 at 384 px, tiles, and Qwen2."""
    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            vision_config=_siglip(size, 384),
            text_config=_qwen2(size),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        )
    )


def pixtral(size: Size) -> Any:
    """Pixtral-12B: a Pixtral tower with patches of 16 px and Mistral NeMo."""
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=_pixtral_tower(size, patch_size=16, image_size=1024),
            text_config=_mistral(size, 2.8),  # 14,336 at 5,120
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def mistral3(size: Size) -> Any:
    """Mistral-Small-3.1-24B: a Pixtral tower with patches of 14 px, merged 2×2."""
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            vision_config=_pixtral_tower(size, patch_size=14, image_size=1540),
            text_config=_mistral(size, 6.4),  # 32,768 at 5,120
            image_token_index=IMAGE,
        )
    )


def internvl(size: Size) -> Any:
    """InternVL3-8B: InternViT-300M/14 at 448 px and Qwen2.5."""
    vision = transformers.InternVLVisionConfig(**_tower(size, 4), attention_bias=True)
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config=vision, text_config=_qwen2(size), image_token_id=IMAGE
        )
    )


def idefics3(size: Size) -> Any:
    """Idefics3-8B: SigLIP-so400m/14 at 364 px, merged 2×2, and Llama 3."""
    vision = transformers.Idefics3VisionConfig(**_so400m(size, 364))
    text = _llama(size, 3.5, kv_share=4)  # 14,336 at 4,096
    return transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(
            vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2
        )
    )


def smolvlm(size: Size) -> Any:
    """SmolVLM2-2.2B: SigLIP-so400m/14 at 384 px, merged 3×3, and SmolLM2."""
    vision = transformers.SmolVLMVisionConfig(**_so400m(size, 384))
    return transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(
            vision_config=vision,
            text_config=_llama(size, 4),
            image_token_id=IMAGE,
            scale_factor=3,
        )
    )


def gemma3(size: Size) -> Any:
    """Gemma-3-4B: SigLIP-so400m/14 at 896 px, pooled 4×4. At 2,560 it has 10 heads, not 8."""
    text: dict[str, Any] = _text(size, 4, kv_share=2) | {"head_dim": 256, "sliding_window": 1024}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config=_siglip(size, 896),
            text_config=transformers.Gemma3TextConfig(**text),
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        )
    )


def paligemma(size: Size) -> Any:
    """PaliGemma-3B at 448 px: SigLIP-so400m/14 and Gemma."""
    text: dict[str, Any] = _text(size, 8, kv_share=size.heads) | {"head_dim": 256}
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=_siglip(size, 448),
            text_config=transformers.GemmaConfig(**text),
            image_token_index=IMAGE,
            projection_dim=size.width,
        )
    )


def qwen2_vl(size: Size) -> Any:
    """Qwen2-VL-7B."""
    vision = {
        "depth": size.vision_layers,
        "embed_dim": size.vision_width,
        "num_heads": size.vision_heads,
        "hidden_size": size.width,
    }
    text = _qwen_text(size) | _mrope([16, 24, 24])
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **_QWEN_TOKENS)
    )


def qwen2_5_vl(size: Size) -> Any:
    """Qwen2.5-VL-7B."""
    vision = _qwen_tower(size, 2.671875) | {  # 3,420 at 1,280
        "fullatt_block_indexes": list(range(size.vision_layers - 1, 0, -8))
    }
    text = _qwen_text(size) | _mrope([16, 24, 24])
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_QWEN_TOKENS)
    )


def qwen3_vl(size: Size) -> Any:
    """Qwen3-VL-8B."""
    text: dict[str, Any] = _text(size, 3, kv_share=4) | _mrope([24, 20, 20]) | {"head_dim": 128}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            vision_config=_deepstack_tower(size), text_config=text, **_QWEN_TOKENS
        )
    )


def qwen3_vl_moe(size: Size) -> Any:
    """Qwen3-VL-30B-A3B: 128 experts a layer, of which 8 see a token."""
    text: dict[str, Any] = _text(size, 3, kv_share=8) | _mrope([24, 20, 20])
    text |= {
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": round(size.width * 0.375),  # 768 at 2,048
    }
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            vision_config=_deepstack_tower(size), text_config=text, **_QWEN_TOKENS
        )
    )


def _tower(size: Size, ratio: float) -> dict[str, Any]:
    return {
        "hidden_size": size.vision_width,
        "intermediate_size": round(size.vision_width * ratio),
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
    }


def _so400m(size: Size, image_size: int) -> dict[str, Any]:
    ratio = 3.7361111  # 4,304 at 1,152
    return _tower(size, ratio) | {"image_size": image_size, "patch_size": 14}


def _siglip(size: Size, image_size: int) -> Any:
    return transformers.SiglipVisionConfig(**_so400m(size, image_size), vision_use_head=False)


def _clip(size: Size) -> Any:
    return transformers.CLIPVisionConfig(
        **_tower(size, 4), image_size=336, patch_size=14, projection_dim=768
    )


def _pixtral_tower(size: Size, **sides: Any) -> Any:
    return transformers.PixtralVisionConfig(**_tower(size, 4), **sides)


def _qwen_tower(size: Size, ratio: float) -> dict[str, Any]:
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_width,
        "intermediate_size": round(size.vision_width * ratio),
        "num_heads": size.vision_heads,
        "out_hidden_size": size.width,
    }


def _deepstack_tower(size: Size) -> dict[str, Any]:
    layers = {size.vision_layers * n // 27 for n in (8, 16, 24)}
    return _qwen_tower(size, 3.7361111) | {"deepstack_visual_indexes": sorted(layers)}


def _text(size: Size, ratio: float, kv_share: int = 1) -> dict[str, Any]:
    """An LLM. So many heads share keys, or all heads where their number is no multiple of it."""
    n_kv = size.heads // kv_share if size.heads % kv_share == 0 else 1
    return {
        "vocab_size": WORDS,
        "hidden_size": size.width,
        "intermediate_size": round(size.width * ratio),
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": n_kv,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _llama(size: Size, ratio: float = 2.6875, kv_share: int = 1) -> Any:
    return transformers.LlamaConfig(**_text(size, ratio, kv_share))  # 11,008 at 4,096


def _mistral(size: Size, ratio: float) -> Any:
    text: dict[str, Any] = _text(size, ratio, kv_share=4) | {"head_dim": 128}
    return transformers.MistralConfig(**text, sliding_window=None)


def _qwen_text(size: Size) -> dict[str, Any]:
    # 18,944 and 4 heads with own keys at 3,584.
    return _text(size, 5.2857142857, kv_share=max(1, size.heads // 4))


def _qwen2(size: Size) -> Any:
    return transformers.Qwen2Config(**_qwen_text(size))


def _mrope(section: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    return {"rope_parameters": rope}


_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
