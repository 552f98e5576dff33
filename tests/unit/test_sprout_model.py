"""The sprout VLM: assembled from its parts, loaded by plain transformers, and able to see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from budwood.errors import InputError
from budwood.halves import fast_half
from budwood.sprout import balanced, load_vlm, make_scene, vlm_directory
from budwood.sprout.gguf import load_llama
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


def test_a_gguf_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(40)])
    writer.add_token_types([1] * 40)
    writer.add_eos_token_id(3)
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    sizes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.{i}.{name}.weight": size for i in range(2) for name, size in sizes.items()}
    shapes |= {"token_embd.weight": (40, 32), "output_norm.weight": (32,)}
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = numbers.normal(size=shape).astype(np.float32)
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else GGMLQuantizationType.Q4_1
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    model = load_llama(tmp_path / "tiny.gguf", torch.float32)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for name, weight in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    for key in ("eos_token_id", "max_position_embeddings", "rope_parameters", "rms_norm_eps"):
        assert getattr(model.config, key) == getattr(wanted.config, key)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / PARTS[0]).touch()
    with pytest.raises(InputError, match=f"lack {PARTS[1]}, {PARTS[2]}"):
        build_vlm(tmp_path)


def test_what_ships_is_small() -> None:
    assert sum((WEIGHTS / part).stat().st_size for part in PARTS) < 40e6


def test_the_prompt_is_what_the_recipe_trained_on() -> None:
    processor = load_vlm(high_resolution=False)[1]
    prompt = prompt_for(processor, "What is the largest object?")
    assert prompt == (
        "<|im_start|>user\n<image>\nWhat is the largest object?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(images=make_scene(0).image, text=prompt, return_tensors="pt")
    assert (inputs.input_ids == processor.image_token_id).sum() == 256


def test_a_large_picture_has_an_overview_four_crops_and_newlines() -> None:
    processor = load_vlm()[1]
    picture = make_scene(0, high_resolution=True).image
    if picture.size != (672, 672):
        picture = picture.resize((672, 672))
    prompt = prompt_for(processor, "What is the largest object?")
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    assert (inputs.input_ids == processor.image_token_id).sum() == 5 * 256 + 32


@pytest.mark.parametrize("high_resolution", [True, False])
def test_plain_transformers_loads_it_and_it_sees(high_resolution: bool) -> None:
    folder = vlm_directory(high_resolution)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=fast_half()).eval()
    processor = AutoProcessor.from_pretrained(folder)
    chosen = balanced(9, 6, "validation", high_resolution)
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
