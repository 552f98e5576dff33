"""The packed sequences that sprout's recipe trains on equal single-turn training."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from budwood.sprout.model import IMAGE_TOKEN, assemble, load_tokenizer, tower_config

RECIPE = Path(__file__).parents[2] / "recipes" / "sprout"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module("train_llava")


def test_a_packed_scene_has_the_loss_of_its_questions_asked_one_by_one(recipe: ModuleType) -> None:
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
    model = assemble(CLIPVisionModel(tower_config()), LlamaForCausalLM(config), tokenizer)
    scene = recipe.Packed(tokenizer, "questions", images=2_000, start=1_600, batch=1)[0]
    assert len(scene.shared) == len(tokenizer(recipe.PREFIX)["input_ids"]) + 256
    alone = [single_turn(model, scene, segment, tokenizer) for segment in scene.segments]
    tokens = sum(len(segment.asked) for segment in scene.segments)

    model.model.language_model.set_attn_implementation("packed")
    with torch.no_grad():
        loss, hits = recipe.loss_and_hits(model, recipe.collate([scene]))
    assert hits.shape == (tokens, 2)
    torch.testing.assert_close(loss, torch.stack(alone).sum() / tokens)


@torch.no_grad()
def single_turn(model, scene, segment, tokenizer) -> torch.Tensor:
    """Summed loss of one answer, through the unchanged model from pixels on."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    words = [image if token < 0 else token for token in scene.shared + segment.given]
    ids = torch.tensor([words + segment.asked])
    labels = ids.clone()
    labels[:, : len(words)] = -100
    out = model(input_ids=ids, pixel_values=scene.pixels[None], labels=labels)
    return out.loss * len(segment.asked)


def test_few_patches_show_every_object(recipe: ModuleType) -> None:
    data = recipe.Packed(load_tokenizer(), "questions", images=2_000, start=0, batch=4)
    shown = [[~token for token in data[i].shared if token < 0] for i in range(4)]
    assert {len(patches) for patches in shown} == {16}
    for i, patches in enumerate(shown):
        scene = recipe.make_scene(data.first + i, "train")
        assert {recipe.what_covers(scene, p) for p in patches} >= set(scene.objects)
