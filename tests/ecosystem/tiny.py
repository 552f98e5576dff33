"""A tiny LLaVA with its processor, pictures and questions, and a pruned prompt run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration, LlavaProcessor

from tests import tiny_vlm

KEEP = 5
QUESTIONS = [
    "What is the largest object ?",
    "Which digit is beside the bell in the picture ?",
    "What is directly left of the ball ?",
    "What is directly right of the piano in the picture ?",
]


def save(folder: Path) -> Path:
    return tiny_vlm.save_llava(folder)


def save_wide(folder: Path) -> Path:
    """The same with 64 channels."""
    wide = {"hidden_size": 64, "intermediate_size": 128}
    tower = CLIPVisionConfig(**tiny_vlm.CLIP | wide | {"num_attention_heads": 4})
    return tiny_vlm.save_llava(folder, tower, tiny_vlm.TEXT | wide)


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    model = LlavaForConditionalGeneration.from_pretrained(folder, **options)
    model.generation_config.eos_token_id = None  # so that answers have full length
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(number: int) -> list[dict[str, Any]]:
    """A user's turn: a picture and a question."""
    content = [
        {"type": "image", "image": picture(number)},
        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
    ]
    return [{"role": "user", "content": content}]


def inputs(processor: Any, *numbers: int) -> dict[str, Tensor]:
    """Inputs of ``generate`` for some chats, padded on the left."""
    processor.tokenizer.padding_side = "left"
    made = processor.apply_chat_template(
        [chat(number) for number in numbers],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return dict(made)


def logits_by_hand(model: Any, ids: Tensor, pixels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Read a prompt with one picture without the tokens that were dropped.

    Args:
        model: with nothing attached.
        ids: the whole prompt without padding, shape (n_tokens,).
        pixels: shape (1, 3, height, width).
        kept: visual tokens that stay.

    Returns:
        Logits, float32, shape (n_kept, n_words), and the place in the prompt of each token.
    """
    is_image = ids == model.config.image_token_id
    stays = ~is_image
    stays[is_image.nonzero().flatten()[kept]] = True
    words = model.get_input_embeddings()(ids.where(~is_image, 0))
    features = model.get_image_features(pixel_values=pixels).pooler_output[0]
    embeds = words.masked_scatter(is_image[:, None], features.to(words.dtype))[stays][None]
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        position_ids=torch.arange(embeds.shape[1])[None],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)[0].float(), stays.nonzero().flatten()


def scores_by_hand(
    model: Any, ids: Tensor, pixels: Tensor, kept: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token but the first, given those before it, and their places."""
    logits, places = logits_by_hand(model, ids, pixels, kept)
    scores = (logits[:-1] / temperature).log_softmax(-1)
    return scores.gather(-1, ids[places][1:, None])[:, 0], places[1:]


@torch.no_grad()
def greedy_by_hand(model: Any, ids: Tensor, pixels: Tensor, kept: Tensor, n_new: int) -> Tensor:
    """Answer a prompt without the tokens that were dropped, with no cache."""
    for _ in range(n_new):
        logits, _ = logits_by_hand(model, ids, pixels, kept)
        ids = torch.cat((ids, logits[-1:].argmax(-1)))
    return ids[-n_new:]
