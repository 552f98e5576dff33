"""Adapters of format 1 load, and give the logits that they gave then.

``adapters`` holds a tiny Llama, an adapter for each kind of statistics, and logits on
``tiny_llm.batch(seed=9)``. All were written by commit b939812, before the tree was reshaped. Their
weights are called ``slim_in`` and ``slim_out``; now they are ``slim_in.weight`` and so on.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from budwood.tune import SlimConfig
from tests import tiny_llm as tiny

FOLDER = Path(__file__).parent / "adapters"


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
def test_transformers_loads_an_old_adapter(name, inputs):
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "base").eval()
    base.load_adapter(str(FOLDER / name))
    expected = load_file(FOLDER / "logits.safetensors")[name]
    torch.testing.assert_close(tiny.logits(base, inputs), expected, rtol=1e-5, atol=1e-5)


def in_format_1(folder):
    """Give a saved adapter the names of format 1."""
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    old = {
        key.removesuffix(".weight") if ".slim_in." in key or ".slim_out." in key else key: value
        for key, value in load_file(tensors).items()
    }
    assert sum(key.endswith((".slim_in", ".slim_out")) for key in old) == 18
    save_file(old, tensors)
    config.write_text(json.dumps({**json.loads(config.read_text()), "slim_version": 1}))


@pytest.mark.parametrize("way", ["peft", "second", "transformers", "auto", "low memory"])
@pytest.mark.parametrize("is_old", [True, False])
def test_a_small_adapter_with_the_old_names(way, is_old, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = tiny.trained(model=base)
    expected, folder = tiny.logits(model), tmp_path / "adapter"
    model.save_pretrained(folder)
    if is_old:
        in_format_1(folder)
    if way == "transformers":
        loaded = tiny.llama()
        loaded.load_adapter(str(folder))
    elif way == "auto":
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    elif way == "second":
        loaded = tiny.slim()
        loaded.load_adapter(str(folder), adapter_name="second")
        loaded.set_adapter("second")
    else:
        low = way == "low memory"
        loaded = peft.PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=low)
    assert torch.equal(tiny.logits(loaded.eval()), expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    saved = again / "second" if way == "second" else again
    names = load_file(saved / "adapter_model.safetensors").keys()
    assert names == tiny.states(model).keys()


@pytest.mark.parametrize("name", ["discriminant", "whitened", "max"])
def test_an_old_adapter_is_saved_with_the_present_names(name, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "base").eval()
    model = peft.PeftModel.from_pretrained(base, FOLDER / name).eval()
    model.save_pretrained(tmp_path)
    old, new = (load_file(f / "adapter_model.safetensors") for f in (FOLDER / name, tmp_path))
    ends = (".slim_in", ".slim_out")
    renamed = {f"{k}.weight" if k.endswith(ends) else k: v for k, v in old.items()}
    assert renamed.keys() == new.keys() != old.keys()
    assert all(torch.equal(value, new[key]) for key, value in renamed.items())
    config = SlimConfig.from_pretrained(str(tmp_path))
    assert (config.distance, config.fit_on, config.alpha) == (name, "supervised", 32.0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["slim_version"] == 3


def test_the_scale_of_format_2(tmp_path):
    """With ranks of their own, layers had alpha = 2 · r of their own, even where it was given."""
    model = tiny.trained(rank_pattern={"down_proj": 1})
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["alpha"] is None
    path.write_text(json.dumps({**saved, "alpha": 6.0, "slim_version": 2}))
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(tiny.logits(loaded), expected)
    path.write_text(json.dumps({**saved, "alpha": 6.0}))
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert not torch.allclose(tiny.logits(loaded), expected)
