"""The packed sequences that sprout's recipe trains on equal single-turn training."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from budwood.sprout.model import IMAGE_TOKEN, assemble, load_tokenizer, tower_config
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


def test_a_packed_scene_has_the_loss_of_its_questions_asked_one_by_one(
    exercises: ModuleType, training: ModuleType
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
    model = assemble(CLIPVisionModel(tower_config()), LlamaForCausalLM(config), tokenizer)
    scene = exercises.Exercises(tokenizer, "questions", images=8_000, start=6_000, batch=1)[0]
    assert len(scene.shared) == len(tokenizer(exercises.PREFIX)["input_ids"]) + 256
    as_users_ask = [s for s in scene.segments if s[0].kind in exercises.KINDS]
    scene.segments = as_users_ask
    alone = [single_turn(model, scene, segment, tokenizer) for segment in scene.segments]
    tokens = sum(len(turn.asked) for segment in scene.segments for turn in segment)

    model.model.language_model.set_attn_implementation("packed")
    with torch.no_grad():
        loss, hits = training.loss_and_hits(model, training.collate([scene]))
    assert hits.shape == (tokens, 2)
    torch.testing.assert_close(loss, torch.stack(alone).sum() / tokens)


@torch.no_grad()
def single_turn(model, scene, segment, tokenizer) -> torch.Tensor:
    """Summed loss of a segment's answers, through the unchanged model from pixels on."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids, labels = list(scene.shared), [-100] * len(scene.shared)
    for turn in segment:
        ids += turn.tokens
        labels += [-100] * len(turn.given) + turn.asked
    ids = torch.tensor([[image if token < 0 else token for token in ids]])
    out = model(input_ids=ids, pixel_values=scene.pixels[None], labels=torch.tensor([labels]))
    return out.loss * sum(len(turn.asked) for turn in segment)


@pytest.mark.parametrize("start", [0, 2_480])
def test_few_patches_show_some_objects_then_all(exercises: ModuleType, start: int) -> None:
    data = exercises.Exercises(load_tokenizer(), "questions", images=8_000, start=start, batch=8)
    shown = [[~token for token in data[i].shared if token < 0] for i in range(8)]
    assert len({len(patches) for patches in shown}) == 1
    assert len(shown[0]) < 40
    for i, patches in enumerate(shown):
        scene = make_scene(data.first + start + i, "train")
        found = {exercises.what_covers(scene, p) for p in patches} - {None}
        assert (found == set(exercises.patches_of(scene, random.Random(0)))) == (start > 0)


def test_tables_are_looked_up_by_what_they_hold(exercises: ModuleType) -> None:
    tokenizer = load_tokenizer()
    data = exercises.Exercises(tokenizer, "regions", images=40, start=0, batch=4)
    scene = make_scene(data.first, "train")
    words = [s for s in data[0].segments if s[0].kind == "word key"]
    assert words
    for segment in words:
        table = tokenizer.decode([token for token in segment[0].given if token >= 0])
        rows = [row.rsplit(" ", 1) for row in table.strip(",").split(",")]
        names = {letter: name.strip() for name, letter in rows}
        for turn in segment:
            letter = tokenizer.decode(turn.asked).strip(" ,")
            assert names[letter] == exercises.what_covers(scene, ~turn.given[-1]).category
