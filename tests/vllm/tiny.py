"""Tiny random models on disk with heads of 32, which vLLM's attention needs; pictures; engines."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from budwood.prune import attach
from budwood.serve.vllm import served_name
from tests import tiny_vlm
from tests.tiny_vlm import PATCH, PINPOINTS, SIDE, TEMPLATE, save, text_config, tokenizer

TEXT = {
    "hidden_size": 96,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


TOWER = tiny_vlm.TOWER | {"num_attention_heads": 6}
CLIP = CLIPVisionConfig(**tiny_vlm.CLIP | TOWER)
"""vLLM wants heads of an even number."""


def save_llava(folder: Path) -> Path:
    return tiny_vlm.save_llava(folder, CLIP, TEXT)


def save_llava_next(folder: Path) -> Path:
    return tiny_vlm.save_llava_next(folder, CLIP, TEXT)


def save_onevision(folder: Path) -> Path:
    """LLaVA-OneVision with rasters of up to 16 crops, of which more than 9 are shrunk."""
    torch.manual_seed(0)
    tokens = tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<video>"]})
    pinpoints = [*PINPOINTS, [SIDE, 4 * SIDE], [4 * SIDE, 4 * SIDE]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text_config(len(tokens), TEXT),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints),
        tokens,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return save(LlavaOnevisionForConditionalGeneration(config), processor, folder)


NAMED = {"start_image_token": "<img>", "end_image_token": "</img>"}
NAMED |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}


def save_internvl(folder: Path, **vision: Any) -> Path:
    """InternVL with tiles of 16 tokens, of four patches each."""
    torch.manual_seed(0)
    tokens = tokenizer(**NAMED)
    sizes = TOWER | {"patch_size": PATCH // 2, "layer_scale_init_value": 1.0, "hidden_size": 48}
    config = InternVLConfig(
        vision_config=sizes | vision,
        text_config=text_config(len(tokens), TEXT),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():  # zeros in a new model
        model.model.vision_tower.embeddings.cls_token.normal_()
        model.model.vision_tower.embeddings.position_embeddings.normal_()
    size = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        GotOcr2ImageProcessorPil(size=size, max_patches=4),
        tokens,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=TEMPLATE.replace("<image>", "<IMG_CONTEXT>"),
    )
    return save(model, processor, folder)


QWEN_VISION = {
    "depth": 4,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "initializer_range": 0.3,
}
QWEN2_VISION = QWEN_VISION | {
    "embed_dim": 48,
    "hidden_size": TEXT["hidden_size"],
    "mlp_ratio": 2,
}
QWEN25_VISION = QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [0, 2]}
QWEN3_VISION = QWEN_VISION | {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 25}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
MARKERS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
QWEN_IMAGE = "<|vision_start|> <|image_pad|> <|vision_end|>"
QWENS = {
    "qwen2_vl": (Qwen2VLConfig, QWEN2_VISION, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        QWEN25_VISION,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    ),
    "qwen3_vl": (Qwen3VLConfig, QWEN3_VISION, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
}


def save_qwen(folder: Path, kind: str) -> Path:
    """A Qwen-VL; a picture of 8·h × 8·w pixels has h × w tokens."""
    torch.manual_seed(0)
    make_config, vision, model, processor = QWENS[kind]
    tokens = tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": list(MARKERS.values())})
    ids = {name: tokens.convert_tokens_to_ids(token) for name, token in MARKERS.items()}
    text = TEXT | {
        "vocab_size": len(tokens),
        "rope_parameters": MROPE,
        "tie_word_embeddings": False,
    }
    if kind == "qwen3_vl":  # its sections are interleaved, and the first one is the longest
        text["rope_parameters"] = MROPE | {"mrope_section": [6, 5, 5]}
    else:
        text.pop("head_dim")
    config = make_config(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 64, "longest_edge": 16384}
    videos = Qwen3VLVideoProcessor if kind == "qwen3_vl" else Qwen2VLVideoProcessor
    made = processor(
        Qwen2VLImageProcessorPil(**sizes),
        tokens,
        videos(**sizes),
        chat_template=TEMPLATE.replace("<image>", QWEN_IMAGE),
    )
    return save(model(config), made, folder)


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(processor: Any, *texts: str, n_images: int = 1) -> str:
    """A prompt: user, assistant, user, …; the images are in the first turn."""
    turns: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if number == 0:
            content = [{"type": "image"}] * n_images + content
        turns.append({"role": "assistant" if number % 2 else "user", "content": content})
    return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def settings(architecture: str, **pruning: Any) -> dict[str, Any]:
    return {"architectures": [served_name(architecture)], "budwood": pruning}


def takes_videos(folder: Path) -> bool:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return kind not in ("llava", "llava_next")


@contextmanager
def engine(folder: Path, overrides: dict[str, Any] | None = None, **options: Any):
    """A vLLM engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {"max_model_len": 512, "block_size": 32, "dtype": "float32", "seed": 0}
    given |= {
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 4, **({"video": 0} if takes_videos(folder) else {})},
    }
    llm = LLM(str(folder), hf_overrides=overrides or {}, **{**given, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def model_of(llm: Any) -> Any:
    """The model inside an engine of this process."""
    return llm.apply_model(lambda model: model)[0]


def recorded(llm: Any) -> list[Any]:
    """Every choice of an engine from here on."""
    model, kept = model_of(llm), []
    choose = model.choose

    def noting(*args: Any) -> Any:
        selection = choose(*args)
        kept.append(selection.indices.tolist())
        return selection

    model.choose = noting
    return kept


def answer(llm: Any, requests: list[dict[str, Any]], n_new: int = 6) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=n_new, ignore_eos=True)
    outputs = llm.generate(requests, greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def request(prompt: str, *images: Image.Image, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "multi_modal_data": {"image": list(images)}, **more}


def attached(
    folder: Path, requests: list[dict[str, Any]], n_new: int = 6, **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Kept tokens of each image and the answers, of transformers with ``attach``."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    kept, answers = [], []
    for one in requests:
        images = one["multi_modal_data"]["image"]
        inputs = processor(images=images, text=[one["prompt"]], return_tensors="pt")
        with attach(model, processor=processor, **options) as session:
            out = model.generate(
                **inputs, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False
            )
            kept += [image.kept.tolist() for image in session.report]
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return kept, answers
