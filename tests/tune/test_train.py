"""`budwood.tune.train`: what it leaves behind."""

from __future__ import annotations

import peft
import pytest
import torch

from budwood.errors import DivergedError
from budwood.tune import state
from budwood.tune.data import example_of
from budwood.tune.encoding import encode
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.runs import RunFolder
from budwood.tune.train import Settings, train
from tests import tiny_chat

TOKENS = tiny_chat.tokenizer()
QUESTIONS = [{"question": f"Is {i} even?", "answer": "yes, indeed"} for i in range(16)]
ROWS = encode([example_of(one, "cloze") for one in QUESTIONS], TOKENS, 200).rows


def trained(folder, method="slim-whitened", base=None, **settings):
    model = attach(parse_tuner(method), base or tiny_chat.model(), 2, 0)
    chosen = Settings(**{"steps": 6, "batch": 4, "lr": 1e-2, **settings})
    train(model, TOKENS, ROWS, chosen, RunFolder(folder, {}))
    return model.eval()


@pytest.mark.parametrize("method", ["slim-whitened", "lora"])
def test_in_bfloat16_what_was_trained_is_what_is_loaded(tmp_path, method):
    base = tiny_chat.model().to(torch.bfloat16)
    inputs = {"input_ids": torch.tensor([ROWS[0]["input_ids"]])}
    model = trained(tmp_path, method, base)
    with torch.no_grad():
        fresh = model(**inputs).logits
        again = peft.PeftModel.from_pretrained(
            tiny_chat.model().to(torch.bfloat16), str(tmp_path)
        ).eval()(**inputs)
    assert torch.equal(fresh, again.logits)


def test_an_infinite_input_names_the_last_checkpoint(tmp_path, monkeypatch):
    inner, steps = state.Clusters.taken, []

    def taken(self):
        found = inner(self)
        steps.append(1)
        return found if len(steps) < 100 else found.fill_(float("inf"))

    monkeypatch.setattr(state.Clusters, "taken", taken)
    with pytest.raises(DivergedError, match=r"inputs of layer .*checkpoint-\d+; try a lower"):
        trained(tmp_path, steps=200, save_every=1)
