"""Scores of a base model that the next adapter uses again."""

from __future__ import annotations

import random

import pytest
import torch

from budwood.tune.evaluate import suite as suites
from budwood.tune.evaluate.base_results import Kept, base_identity
from budwood.tune.evaluate.divergence import make_texts
from budwood.tune.evaluate.suite import Suite
from budwood.tune.evaluate.tasks import find_tasks
from budwood.tune.methods import attach, parse_tuner
from tests import tiny_chat

TOKENS = tiny_chat.tokenizer()


def adapted(method="lora", seed=0, model=None):
    model = attach(parse_tuner(method), model or tiny_chat.model(), 2, seed).eval()
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "slim_out" in name:
            torch.nn.init.normal_(weight, 0, 0.3)
    return model


@pytest.fixture
def tasks(tmp_path):
    draw = random.Random(2)
    rows = [tiny_chat.question(draw, 2) for _ in range(4)]
    return find_tasks([str(tiny_chat.write_lines(tmp_path / "a.jsonl", rows))], [], None, 0, 0)


def kept(folder, model):
    return Kept(folder, base_identity(model, TOKENS))


def test_the_base_is_scored_once(tmp_path, tasks, monkeypatch):
    suite, runs = Suite(tasks), []
    inner = Suite._tasks
    monkeypatch.setattr(suites.Suite, "_tasks", lambda *a: runs.append(0) or inner(*a))
    first, second = adapted("lora", 0), adapted("slim:n_experts=3+texts=0", 1)
    fresh = suite.before(first, TOKENS)
    before = suite.before(first, TOKENS, kept=kept(tmp_path, first))
    again = suite.before(second, TOKENS, kept=(store := kept(tmp_path, second)))
    assert fresh == before == again and len(runs) == 2 and store.n_found == 1
    assert suite.after(first, TOKENS) != before
    suite.before(first, TOKENS, kept=kept(None, first))
    Suite(tasks, style="listed").before(first, TOKENS, kept=kept(tmp_path, first))
    assert len(runs) == 5  # one was the score after


def test_replies_are_written_once(tmp_path, monkeypatch):
    options = {"text": None, "n_windows": 1, "n_prompts": 3}
    model = adapted()
    fresh = make_texts(model, TOKENS, **options)
    first = make_texts(model, TOKENS, **options, kept=kept(tmp_path, model))
    monkeypatch.setattr("budwood.tune.evaluate.divergence.replies", None)
    again = make_texts(model, TOKENS, **options, kept=kept(tmp_path, adapted(seed=1)))
    assert fresh == first == again


def change_weight(model, tokens):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] *= 1.0001


def change_embedding(model, tokens):
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1e-6


def change_config(model, tokens):
    model.config.rms_norm_eps = 1e-4


def change_template(model, tokens):
    tokens.chat_template += " "


def change_vocabulary(model, tokens):
    tokens.add_tokens(["word"])


@pytest.mark.parametrize(
    "change",
    [change_weight, change_embedding, change_config, change_template, change_vocabulary],
)
def test_another_base_has_its_own(change):
    model, tokens = tiny_chat.model(), tiny_chat.tokenizer()
    before = base_identity(model, tokens)
    assert before == base_identity(tiny_chat.model(), tiny_chat.tokenizer())
    change(model, tokens)
    assert before != base_identity(model, tokens)


@pytest.mark.parametrize("method", ["lora", "slim:n_experts=3+texts=0", "dora"])
def test_adapters_are_no_part_of_the_base(method):
    plain = base_identity(tiny_chat.model(), TOKENS)
    assert base_identity(adapted(method), TOKENS) == plain
    assert base_identity(tiny_chat.model().bfloat16(), TOKENS) != plain


def test_damaged_files_are_made_again_and_none_is_needed(tmp_path):
    store = Kept(tmp_path / "cache", {"a": 1})
    assert store.get({"b": 2}, lambda: [3]) == [3] == store.get({"b": 2}, lambda: [4])
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text("[3")
    assert store.get({"b": 2}, lambda: [5]) == [5] == store.get({"b": 2}, lambda: [6])
    assert store.n_found == 2
    (tmp_path / "file").touch()
    assert Kept(tmp_path / "file" / "cache", {}).get({}, lambda: 7) == 7
