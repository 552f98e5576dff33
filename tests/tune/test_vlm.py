"""SLIM on the language model of a vision-language model that is pruned at the same time."""

from __future__ import annotations

import peft
import pytest
import torch

from budwood.prune import attach
from budwood.tune import SlimLinear
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
                clusters = layers[0].slim_clusters["default"]
                moments = clusters._no_moments().filled(clusters.pending)
                assert moments.count.sum() == (data["labels"][:, 1:] != -100).sum() > 0
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
