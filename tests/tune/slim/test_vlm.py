"""SLIM on the language model of a vision-language model that is pruned at the same time."""

from __future__ import annotations

import peft
import pytest
import torch

from budwood.prune import attach
from budwood.prune.chat import render
from budwood.sprout import ask, load_vlm, make_scene
from budwood.tune import SlimConfig, SlimLinear
from tests import tiny_llm as tiny
from tests.contract import models

CASES = {"llava": models.llava, "llava_next": models.llava_next, "qwen2_5_vl": models.qwen2_5_vl}


@pytest.mark.parametrize("family", CASES)
def test_tuning_a_pruned_model(family):
    case = CASES[family]()
    data = case.batch([7, models.words(6, 1)], [models.words(4, 2), 8, models.words(5, 3)])
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    data["labels"][:, :-3] = -100  # the answers
    model = peft.get_peft_model(case.model, tiny.config(task_type=None))
    layers = [one for one in model.modules() if isinstance(one, SlimLinear)]
    assert len(layers) == 9 and all("language_model" in one.slim_key for one in layers)
    model.train()
    optim = tiny.optimiser(model)
    losses = []
    with attach(model, method="adav", keep=6, forward=True) as session:
        for step in range(8):
            optim.zero_grad()
            loss = model(**data).loss
            loss.backward()
            if step == 0:  # what is no answer is in no statistics, whether pruned or not
                statistics = layers[0].slim_clusters["default"]
                assert (
                    statistics.gathered().count.sum() == (data["labels"][:, 1:] != -100).sum() > 0
                )
            optim.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    del data["labels"]
    with attach(model, method="adav", keep=6) as session:
        answer = model.generate(**data, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] == data["input_ids"].shape[1] + 4
    assert [entry.n_after for entry in session.report] == [6, 6]
    assert torch.isfinite(model(**data).logits).all()


def test_sprout_learns_a_new_way_to_answer_on_few_tokens():
    """Scenes, the embedded model, and 64 of its 256 visual tokens, in training and after."""
    model, processor = load_vlm(high_resolution=False)
    processor.tokenizer.padding_side = "left"
    asked = [(s, ask(s, "largest")[0]) for s in map(make_scene, range(40)) if ask(s, "largest")]
    prompt = render(processor, "What is the largest object?")

    def batch(part, answered=True):
        answers = [f"Certainly the {q.answer}<|im_end|>" if answered else "" for _, q in part]
        images, text = [scene.image for scene, _ in part], [prompt + answer for answer in answers]
        data = processor(images=images, text=text, return_tensors="pt", padding=True)
        data = data.to(model.dtype)
        if answered:
            data["labels"] = torch.full_like(data.input_ids, -100)
            for i, answer in enumerate(answers):
                n = len(processor.tokenizer(answer).input_ids)
                data["labels"][i, -n:] = data.input_ids[i, -n:]
        return data

    def said(adapted):
        data = batch(asked[-4:], answered=False)
        answers = adapted.generate(**data, max_new_tokens=6, do_sample=False)
        return processor.batch_decode(answers[:, data.input_ids.shape[1] :])

    quick = SlimConfig(r=4, alpha=8, n_directions=8, merging=False, task_type=None)
    adapted = peft.get_peft_model(model, quick)
    optim = tiny.optimiser(adapted.train(), lr=5e-3)
    with attach(adapted, method="adav", keep=64, processor=processor, forward=True):
        for step in range(16):
            optim.zero_grad()
            adapted(**batch([asked[(4 * step + i) % 32] for i in range(4)])).loss.backward()
            optim.step()
    with attach(adapted.eval(), method="adav", keep=64, processor=processor) as session:
        after = said(adapted)
        with adapted.disable_adapter():
            before = said(adapted)
    assert [entry.n_after for entry in session.report] == [64] * 4
    assert all(answer.startswith("Certainly the ") for answer in after), after
    assert not any(answer.startswith("Certainly") for answer in before)
