"""A reference model is a copy of a trained adapter, whole: weights, statistics and masks."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import peft
import pytest
import torch

from budwood.tune import SlimLinear
from tests import tiny_llm as tiny
from tests import tiny_trl

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
third_party = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:trl"
)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@third_party
@pytest.mark.parametrize("distance", ["whitened", "max"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_the_reference_is_the_trained_adapter(kind, distance, tmp_path):
    model = tiny.trained(distance=distance)
    trained, expected = tiny.states(model), tiny.logits(model)
    trainer = tiny_trl.trainer(kind, model, tmp_path)
    assert same(tiny.states(model, "ref"), trained)
    model.set_adapter("ref")
    assert torch.equal(tiny.logits(model.eval()), expected)
    model.set_adapter("default")
    trainer.train()
    first, second = trainer.state.log_history[:2]
    if kind in ("dpo", "kto"):
        assert first["loss"] == pytest.approx(math.log(2) if kind == "dpo" else 0.5, abs=1e-6)
        assert first["rewards/chosen"] == first["rewards/rejected"] == pytest.approx(0, abs=1e-6)
        assert second["rewards/chosen"] != 0
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-7)
    assert same(tiny.states(model, "ref"), trained)  # it is not trained
    assert not same(tiny.states(model), trained)


@third_party
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_a_fresh_adapters_reference_is_the_base_model(kind, tmp_path):
    from trl.trainer import utils  # noqa: F401

    trainer = tiny_trl.trainer(kind, tiny.llama(), tmp_path, peft_config=tiny.config())
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]
    first = trainer.state.log_history[0]
    if kind in ("dpo", "kto"):
        assert first["loss"] == pytest.approx(math.log(2) if kind == "dpo" else 0.5, abs=1e-6)
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-7)


@third_party
def test_the_documented_example(tmp_path, monkeypatch):
    import trl

    page = Path(__file__).parents[3] / "docs" / "tune.md"
    blocks = re.findall(r"```python compile\n(.*?)```", page.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "DPOTrainer" in block]
    monkeypatch.chdir(tmp_path)
    tiny.trained().save_pretrained("tuned")
    monkeypatch.setattr(trl, "DPOConfig", functools.partial(trl.DPOConfig, **tiny_trl.COMMON))
    names = {"base": tiny.llama(), "pairs": tiny_trl.rows("dpo"), "tokenizer": tiny_trl.tokenizer()}
    exec(code, names)
    first = names["trainer"].state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not Path("preferred", "ref").exists()
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), "preferred").eval()
    found = tiny.logits(loaded)
    assert torch.equal(found, tiny.logits(names["model"].eval()))
    assert not torch.equal(found, tiny.logits(tiny.trained()))


# --- copies without TRL --------------------------------------------------------------------------


def copy_parameters(model, target):
    """As TRL copies an adapter."""
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", f".{target}.")).data.copy_(parameter.data)


def test_a_reference_uses_the_masks_of_what_is_trained():
    model = tiny.trained()
    model.add_adapter("ref", model.peft_config["default"])
    copy_parameters(model, "ref")
    inputs = tiny.batch()
    found = {}
    for steps in range(2):
        model.train()
        for name in ("default", "ref"):
            model.set_adapter(name)
            with torch.no_grad():
                found[name] = model(**inputs).logits
        assert torch.equal(found["default"], found["ref"])
        model.set_adapter("default")
        for layer in model.modules():  # a step that changes the masks alone
            if isinstance(layer, SlimLinear) and not steps:
                layer.slim_mask["default"].commit()
    model.eval()
    model.set_adapter("ref")
    expected = tiny.logits(model)
    model.delete_adapter("default")
    assert torch.equal(tiny.logits(model), expected)
    with torch.no_grad():
        assert model.train()(**inputs).logits.isfinite().all()


def test_an_adapter_with_anothers_config_can_be_trained_from_scratch():
    model = tiny.trained()
    torch.manual_seed(3)
    model.add_adapter("second", model.peft_config["default"])
    alone = tiny.slim()
    torch.manual_seed(3)
    alone.add_adapter("second", tiny.config())
    for one in (model, alone):
        one.set_adapter("second")
        tiny.train(one, 4)
    assert same(tiny.states(model, "second"), tiny.states(alone, "second"))


@pytest.mark.parametrize("training", [True, False])
def test_weights_without_statistics_are_told(training):
    model = tiny.trained()
    model.add_adapter("copy", tiny.config())
    model.set_adapter("copy")
    tiny.logits(model.train(training))  # a fresh adapter needs none
    copy_parameters(model, "copy")
    with pytest.warns(UserWarning, match="'copy' has weights but no statistics"):
        tiny.logits(model)
    tiny.logits(model)  # once
