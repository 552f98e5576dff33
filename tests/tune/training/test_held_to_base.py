"""Training that is held to the base model: on prompts, or on text of the model's own."""

from __future__ import annotations

import pytest
import torch

from budwood.runs import RunFolder
from budwood.tune.data.encoding import encode
from budwood.tune.data.examples import example_of
from budwood.tune.data.self_generated import self_generate
from budwood.tune.evaluate.divergence import measure_drift
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.training.run import train
from budwood.tune.training.settings import Settings
from budwood.tune.training.trainer import AnswerTrainer
from tests import tiny_chat
from tests import tiny_llm as tiny

TOKENS = tiny_chat.tokenizer()


@pytest.fixture(scope="module")
def own():
    return self_generate(tiny_chat.model(), TOKENS, 12)


@pytest.fixture(scope="module")
def rows():
    questions = [{"question": f"Is {i} even?", "answer": "yes, indeed"} for i in range(16)]
    examples = [example_of(one, "cloze") for one in questions]
    return encode(examples, TOKENS, 200).rows


SLIM = "n_experts=2+n_clusters=2+n_directions=8+skip_first=0.0"


def trained(folder, rows, held=(), method="lora", kl=0.0, **how):
    adapted = attach(parse_tuner(method), tiny_chat.model(), 2, 0)
    settings = Settings(**{"steps": 12, "batch": 4, "lr": 1e-2, "schedule": "linear", **how})
    train(adapted, TOKENS, rows, settings, RunFolder(folder, {}), texts=held, kl=kl)
    return adapted.eval()


def divergence(adapted, rows):
    return next(s for s in measure_drift(adapted, TOKENS, rows, "x")[1] if s.metric == "kl").value


def test_own_text_holds_the_model_where_it_is_used(tmp_path, rows, own):
    how = {"steps": 40, "lr": 3e-2}
    free = trained(tmp_path / "free", rows, **how)
    prompts = trained(tmp_path / "prompts", rows, kl=3.0, **how)
    held = trained(tmp_path / "held", rows, own, kl=3.0, **how)
    assert divergence(held, own) < 0.4 * divergence(prompts, own)
    assert divergence(held, own) < 0.3 * divergence(free, own)
    assert divergence(held, rows) > 0.8 * divergence(free, rows)  # and still learns


def test_own_text_goes_on_where_it_was(tmp_path, rows, own, monkeypatch):
    options = {"texts": own, "kl": 1.0}
    whole = trained(tmp_path / "whole", rows, own, kl=1.0, accumulate=2)
    seen = []
    inner = torch.optim.AdamW.step

    def stops(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    settings = Settings(steps=12, batch=4, accumulate=2, lr=1e-2, schedule="linear", save_every=5)
    folder = RunFolder(tmp_path / "cut", {})

    def run():
        adapted = attach(parse_tuner("lora"), tiny_chat.model(), 2, 0)
        train(adapted, TOKENS, rows, settings, folder, **options)
        return adapted.eval()

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert folder.last_checkpoint().name == "checkpoint-5"
    again = tiny.states(run())
    assert all(torch.equal(value, again[key]) for key, value in tiny.states(whole).items())


def test_own_text_is_no_training_data(tmp_path, rows, own):
    """Statistics of SLIM are those without it; weights hardly move at this rate."""
    slim = {"method": f"slim-whitened:{SLIM}", "lr": 1e-12}
    alone = tiny.states(trained(tmp_path / "alone", rows, steps=3, **slim))
    held = tiny.states(trained(tmp_path / "held", rows, own, steps=3, kl=1.0, **slim))
    kept = [key for key in alone if "slim_clusters" in key]
    assert kept and any(float(alone[key].abs().sum()) > 0 for key in kept)
    for key in kept:
        assert torch.allclose(alone[key].float(), held[key].float(), rtol=1e-4, atol=1e-6)


def test_own_text_under_checkpointing(tmp_path, rows, own):
    how = {"held": own, "kl": 1.0, "steps": 4, "method": f"slim-whitened:{SLIM}"}
    plain = tiny.states(trained(tmp_path / "plain", rows, **how))
    again = tiny.states(trained(tmp_path / "again", rows, checkpointing=True, **how))
    for key, value in plain.items():
        assert torch.allclose(value, again[key], rtol=1e-4, atol=1e-6), key


def test_every_pass_has_texts_of_its_own(tmp_path, rows, own, monkeypatch):
    seen = []
    inner = AnswerTrainer._text_kl

    def watched(self, model):
        collate = self.data_collator
        self.data_collator = lambda rows: seen.append(own.index(rows[0])) or collate(rows)
        try:
            return inner(self, model)
        finally:
            self.data_collator = collate

    monkeypatch.setattr(AnswerTrainer, "_text_kl", watched)
    trained(tmp_path / "held", rows, own, steps=3, accumulate=2, kl=1.0)
    assert seen == [0, 1, 2, 3, 4, 5]  # one text to four examples
