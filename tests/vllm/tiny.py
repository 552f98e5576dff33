"""Tiny random models on disk with heads of 32, which vLLM's attention needs; pictures; engines."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from budwood.prune import attach
from budwood.serve.vllm import served_name
from tests import tiny_vlm
from tests.tiny_vlm import PATCH, SIDE, TEMPLATE, save, tokenizer

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


def text_config(n_words: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=n_words, **TEXT)


def vision(kind: type = CLIPVisionConfig) -> Any:
    sizes = {**tiny_vlm.vision_config().to_dict(), "num_attention_heads": 6}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("image_size", "patch_size", "initializer_range", "initializer_factor")
    return kind(**{name: sizes[name] for name in names if name in sizes})


def save_llava(folder: Path, tower: type = CLIPVisionConfig, strategy: str = "default") -> Path:
    torch.manual_seed(0)
    tokens = tokenizer()
    with_cls = tower is CLIPVisionConfig
    config = LlavaConfig(
        vision_config=vision(tower),
        text_config=text_config(len(tokens)),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokens,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(with_cls),
        chat_template=TEMPLATE,
    )
    return save(LlavaForConditionalGeneration(config), processor, folder)


def save_llava_next(folder: Path) -> Path:
    torch.manual_seed(0)
    tokens = tokenizer()
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        vision_config=vision(),
        text_config=text_config(len(tokens)),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=pinpoints,
        ),
        tokens,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return save(LlavaNextForConditionalGeneration(config), processor, folder)


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


@contextmanager
def engine(folder: Path, overrides: dict[str, Any] | None = None, **options: Any):
    """A vLLM engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {"max_model_len": 512, "block_size": 32, "dtype": "float32", "seed": 0}
    given |= {"enforce_eager": True, "limit_mm_per_prompt": {"image": 4}}
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


Saver = Callable[[Path], Path]
