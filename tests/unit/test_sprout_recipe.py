"""The packed sequences that sprout's recipe trains on equal single-turn training."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from budwood.sprout.model import (
    IMAGE_TOKEN,
    assemble,
    load_tokenizer,
    make_high_image_processor,
    tower_config,
)
from budwood.sprout.scenes import make_scene

RECIPE = Path(__file__).parents[2] / "recipes" / "sprout"


@pytest.fixture
def exercises(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module("exercises")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module("train_llava")


@pytest.mark.parametrize("high_resolution", [False, True])
def test_a_packed_scene_has_the_loss_of_its_questions_asked_one_by_one(
    exercises: ModuleType, training: ModuleType, high_resolution: bool
) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    tower = CLIPVisionModel(tower_config())
    model = assemble(tower, LlamaForCausalLM(config), tokenizer, high_resolution)
    stage = "high" if high_resolution else "questions"
    data = exercises.Exercises(tokenizer, stage, images=8_000, start=6_000, batch=1)
    item = data[0]
    scene = make_scene(data.first + 6_000, "train", high_resolution)
    n_visual = sum(token < 0 for token in item.shared)
    assert n_visual > 600 if high_resolution else n_visual == 256
    assert len(item.shared) == len(tokenizer(exercises.PREFIX)["input_ids"]) + n_visual
    item.segments = [s for s in item.segments if s[0].kind in exercises.KINDS]
    alone = [single_turn(model, item, scene, segment, tokenizer) for segment in item.segments]
    tokens = sum(len(turn.asked) for segment in item.segments for turn in segment)

    model.model.language_model.set_attn_implementation("packed")
    with torch.no_grad():
        loss, hits = training.loss_and_hits(model, training.collate([item]))
    assert hits.shape == (tokens, 2)
    torch.testing.assert_close(loss, torch.stack(alone).sum() / tokens)


@torch.no_grad()
def single_turn(model, item, scene, segment, tokenizer) -> torch.Tensor:
    """Summed loss of a segment's answers, through the unchanged model from pixels on."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids, labels = list(item.shared), [-100] * len(item.shared)
    for turn in segment:
        ids += turn.tokens
        labels += [-100] * len(turn.given) + turn.asked
    inputs = {"input_ids": torch.tensor([[image if token < 0 else token for token in ids]])}
    if scene.sign is None:
        inputs["pixel_values"] = item.pixels
    else:
        processor = make_high_image_processor()
        inputs |= processor(scene.image, return_tensors="pt")
    out = model(**inputs, labels=torch.tensor([labels]))
    return out.loss * sum(len(turn.asked) for turn in segment)


def test_pictures_of_different_sizes_are_packed_together(
    exercises: ModuleType, training: ModuleType
) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    data = exercises.Exercises(tokenizer, "high", images=16, start=0, batch=1)
    items = sorted((data[i] for i in range(16)), key=lambda item: len(item.pixels))
    first, last = items[0], items[-1]
    assert len(first.pixels) < len(last.pixels)
    for item in (first, last):
        item.shared = item.shared[:40]
        item.segments = [s for s in item.segments if s[0].kind in exercises.KINDS]
    batch = training.collate([first, last])
    newline = ~exercises.NEWLINE
    expected = [~token for token in first.shared if token < 0 and token != newline]
    offset = 256 * len(first.pixels)
    expected += [~token + offset for token in last.shared if token < 0 and token != newline]
    behind = offset + 256 * len(last.pixels)
    assert [p for p in batch["patches"].tolist() if p != behind] == expected


@pytest.mark.parametrize("start", [0, 2_480])
def test_few_patches_show_some_objects_then_all(exercises: ModuleType, start: int) -> None:
    data = exercises.Exercises(load_tokenizer(), "questions", images=8_000, start=start, batch=8)
    shown = [[~token for token in data[i].shared if token < 0] for i in range(8)]
    assert len({len(patches) for patches in shown}) == 1
    assert len(shown[0]) < 40
    for i, patches in enumerate(shown):
        picture = exercises.small_picture(make_scene(data.first + start + i, "train"))
        found = {picture.covers[p] for p in patches} - {None}
        assert (found == set(exercises.patches_of(picture, random.Random(0)))) == (start > 0)


def test_tables_are_looked_up_by_what_they_hold(exercises: ModuleType) -> None:
    tokenizer = load_tokenizer()
    data = exercises.Exercises(tokenizer, "regions", images=40, start=0, batch=4)
    picture = exercises.small_picture(make_scene(data.first, "train"))
    words = [s for s in data[0].segments if s[0].kind == "word key"]
    assert words
    for segment in words:
        table = tokenizer.decode([token for token in segment[0].given if token >= 0])
        rows = [row.rsplit(" ", 1) for row in table.strip(",").split(",")]
        names = {letter: name.strip() for name, letter in rows}
        for turn in segment:
            letter = tokenizer.decode(turn.asked).strip(" ,")
            assert names[letter] == picture.covers[~turn.given[-1]].category


def test_lora_that_learns_merged_gets_the_gradients_of_lora(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(RECIPE))
    common = importlib.import_module("common")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    targets = ["q_proj", "down_proj"]
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model)
    learnt = {name: p for name, p in model.named_parameters() if "lora_" in name}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in learnt}
    batches = torch.randint(50, (2, 1, 12))

    def gradients() -> dict[str, torch.Tensor]:
        losses = [model(batch, labels=batch).loss for batch in batches]
        torch.stack(losses).sum().backward()
        return {name: p.grad for name, p in learnt.items() if p.grad is not None}

    plain, loss = gradients(), model(batches[0], labels=batches[0]).loss
    model.zero_grad()
    merged = common.MergedLora(model)
    merged.merge()
    torch.testing.assert_close(model(batches[0], labels=batches[0]).loss, loss)
    assert not gradients()
    merged.hand_down()
    assert plain.keys() == learnt.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(learnt[name].grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(model.get_parameter(name).grad is None for name in frozen)
    for layer, weight in zip(merged.layers, merged.weights, strict=True):
        name = next(n for n, m in model.named_modules() if m is layer)
        assert torch.equal(weight, frozen[f"{name}.base_layer.weight"])
