"""Adapters saved by budwood 0.1.0 load, and give the logits that they gave then.

``data/adapters`` holds a tiny Llama, an adapter for each kind of statistics, and logits on
``tiny_llm.batch(seed=9)``. All were written by commit b939812, before the tree was reshaped.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from budwood.tune import SlimConfig
from tests import tiny_llm as tiny

FOLDER = Path(__file__).parent / "data" / "adapters"


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(tiny, "N_WORDS", 31)
    return tiny.batch(seed=9)


@pytest.mark.parametrize("name", ["discriminant", "whitened", "max"])
def test_an_old_adapter_gives_its_logits(name, inputs):
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "base").eval()
    plain = tiny.logits(base, inputs)
    model = peft.PeftModel.from_pretrained(base, FOLDER / name).eval()
    expected = load_file(FOLDER / "logits.safetensors")[name]
    found = tiny.logits(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 0.3  # the adapter does something


@pytest.mark.parametrize("name", ["discriminant", "whitened", "max"])
def test_an_old_adapter_is_saved_with_the_same_keys(name, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "base").eval()
    model = peft.PeftModel.from_pretrained(base, FOLDER / name).eval()
    model.save_pretrained(tmp_path)
    old, new = (load_file(f / "adapter_model.safetensors") for f in (FOLDER / name, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[key]) for key, value in old.items())
    config = SlimConfig.from_pretrained(str(tmp_path))
    assert (config.distance, config.fit_on, config.alpha) == (name, "supervised", 32.0)
