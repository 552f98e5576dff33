"""The sprout VLM: assembled from its parts, loaded by plain transformers, and able to see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from budwood.errors import InputError
from budwood.sprout import balanced, load_vlm, make_scene, vlm_directory
from budwood.sprout.model import (
    LORA_ALPHA,
    LORA_RANK,
    PARTS,
    WEIGHTS,
    build_vlm,
    merge_lora,
)


def prompt_for(processor: AutoProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def test_lora_is_merged_at_its_scale() -> None:
    llm = nn.ModuleDict(
        {"layer": nn.Linear(5, 7, bias=False), "other": nn.Linear(5, 7, bias=False)}
    )
    before = {name: p.clone() for name, p in llm.named_parameters()}
    down, up = torch.randn(LORA_RANK, 5), torch.randn(7, LORA_RANK)
    merge_lora(llm, {"layer.lora_A.weight": down, "layer.lora_B.weight": up})
    wanted = before["layer.weight"] + LORA_ALPHA / LORA_RANK * up @ down
    torch.testing.assert_close(llm.get_parameter("layer.weight"), wanted)
    torch.testing.assert_close(llm.get_parameter("other.weight"), before["other.weight"])


def test_missing_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / PARTS[0]).touch()
    with pytest.raises(InputError, match=f"lack {PARTS[1]}, {PARTS[2]}"):
        build_vlm(tmp_path)


def test_what_ships_is_small() -> None:
    assert sum((WEIGHTS / part).stat().st_size for part in PARTS) < 40e6


def test_the_prompt_is_what_the_recipe_trained_on() -> None:
    processor = load_vlm()[1]
    prompt = prompt_for(processor, "What is the largest object?")
    assert prompt == (
        "<|im_start|>user\n<image>\nWhat is the largest object?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(images=make_scene(0).image, text=prompt, return_tensors="pt")
    assert (inputs.input_ids == processor.image_token_id).sum() == 256


def test_plain_transformers_loads_it_and_it_sees() -> None:
    folder = vlm_directory()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder)
    chosen = balanced(9, 16, "validation")
    hits = 0
    for scene, questions in chosen:
        text = [
            prompt_for(processor, q.text) for q in questions if q.kind in ("largest", "presence")
        ]
        inputs = processor(
            images=[scene.image] * len(text), text=text, return_tensors="pt", padding=True
        ).to(model.dtype)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        wanted = [q.answer for q in questions if q.kind in ("largest", "presence")]
        hits += sum(a.strip() == b for a, b in zip(said, wanted, strict=True))
    assert hits >= 0.75 * 2 * len(chosen)  # blind guessing gets a quarter
