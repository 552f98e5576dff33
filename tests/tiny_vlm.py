"""Directories with tiny random models, tokenizers and processors, as `--model DIR` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from budwood.sprout.atlas import categories
from budwood.sprout.questions import TEMPLATES
from budwood.sprout.scenes import COLOURS

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}</s> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
SIDE, PATCH = 24, 6  # 16 visual tokens a crop


def words() -> list[str]:
    text = " ".join([*TEMPLATES.values(), *categories(), *COLOURS, "yes no user assistant : - ?"])
    return sorted({*text.replace("{}", " ").replace("?", " ? ").split(), *map(str, range(10))})


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a word; more special tokens by the names of their attributes."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        **special,
    )


TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TOWER: dict[str, Any] = {
    "hidden_size": 30,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.3,
}
CLIP = TOWER | {"projection_dim": 8, "initializer_factor": 1.0}


def text_config(n_words: int, sizes: dict[str, Any] = TEXT) -> LlamaConfig:
    return LlamaConfig(vocab_size=n_words, **sizes)


def save_llava(
    folder: Path,
    tower: Any = None,
    sizes: dict[str, Any] = TEXT,
    strategy: str = "default",
) -> Path:
    """LLaVA with CLIP's processing: the shorter side to 24 px, then the centre.

    Args:
        folder: to write.
        tower: configuration of the vision tower; a tiny CLIP by default.
        sizes: of the language model, as in ``TEXT``.
        strategy: ``vision_feature_select_strategy``.
    """
    torch.manual_seed(0)
    tokens = tokenizer()
    tower = CLIPVisionConfig(**CLIP) if tower is None else tower
    config = LlavaConfig(
        vision_config=tower,
        text_config=text_config(len(tokens), sizes),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokens,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(isinstance(tower, CLIPVisionConfig)),
        chat_template=TEMPLATE,
    )
    return save(LlavaForConditionalGeneration(config), processor, folder)


PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def save_llava_next(folder: Path, tower: Any = None, sizes: dict[str, Any] = TEXT) -> Path:
    """LLaVA-NeXT with three shapes of canvas; arguments as of LLaVA."""
    torch.manual_seed(0)
    tokens = tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP) if tower is None else tower,
        text_config=text_config(len(tokens), sizes),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokens,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return save(LlavaNextForConditionalGeneration(config), processor, folder)


def save_blind(folder: Path) -> Path:
    """A language model without vision."""
    tokens = tokenizer()
    return save(LlamaForCausalLM(text_config(len(tokens))), tokens, folder)


def save(model, processor, folder: Path) -> Path:
    with torch.no_grad():  # no special token is ever generated: answers have full length
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
