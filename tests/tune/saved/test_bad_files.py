"""Adapters that don't fit or are damaged are refused in one line."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from budwood.errors import InputError, UnsupportedModelError
from budwood.fingerprint import sampled_weights
from budwood.tune.saved.files import check_adapter_files
from tests import tiny_llm as tiny


@pytest.fixture
def saved(tmp_path):
    tiny.trained(steps=2).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, model=None):
    with pytest.raises(InputError) as error:
        peft.PeftModel.from_pretrained(tiny.llama() if model is None else model, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("names", [["up_projj"], "nothing.*", "up_proj"])
def test_target_modules_that_match_nothing(names):
    base = tiny.llama()
    with pytest.raises(InputError, match="match no layer") as error:
        tiny.slim(base, target_modules=names)
    assert "gate_proj" in str(error.value) and "\n" not in str(error.value)
    if names == ["up_projj"]:
        assert "did you mean 'up_proj'" in str(error.value)
    elif names == "up_proj":
        assert "did you mean '.*[.]up_proj'" in str(error.value)
        assert tiny.slim(tiny.llama(), target_modules=".*[.]up_proj")
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_target_that_is_no_linear_layer():
    with pytest.raises(UnsupportedModelError, match="Embedding.*linear"):
        tiny.slim(target_modules=["embed_tokens"])


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 32}, {"num_hidden_layers": 2}, {"intermediate_size": 48}]
)
def test_another_base_model(saved, changes):
    assert f"made for a base model with {next(iter(changes))}=" in refused(
        saved, tiny.llama(**changes)
    )


def test_tensors_of_other_shapes(saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": None}))
    assert "has shape" in refused(saved, tiny.llama(intermediate_size=48))


def test_adapters_are_no_part_of_what_tells_base_models_apart():
    plain = sampled_weights(tiny.llama())
    assert len(plain) == 21  # seven matrices in each of three layers
    lora = peft.LoraConfig(target_modules=["q_proj", "up_proj"])
    for adapted in (tiny.slim(), peft.get_peft_model(tiny.llama(), lora)):
        assert sampled_weights(adapted.get_base_model()) == plain


def test_another_base_model_of_the_same_sizes(saved):
    other = tiny.llama()
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(torch.randn_like(weight) * 0.02)
    assert "with other weights" in refused(saved, other)
    with pytest.raises(InputError, match="with other weights"):
        tiny.slim(other).load_adapter(saved, "second")


def test_a_base_model_that_was_rounded_or_trained_on_is_the_same_one(saved):
    rounded, trained_on = tiny.llama(torch.bfloat16), tiny.llama(torch.float16)
    with torch.no_grad():
        for weight in trained_on.parameters():
            weight.add_(torch.randn_like(weight) * 0.1 * weight.std())
    longer = tiny.llama()
    longer.resize_token_embeddings(70)
    for model in (rounded, trained_on, longer):
        peft.PeftModel.from_pretrained(model, saved)


def test_a_newer_version(saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "slim_version": 9}))
    assert "format 9" in refused(saved) and "upgrade" in refused(saved)


@pytest.mark.parametrize("size", [0, 5, 500, -7])
def test_truncated_weights(saved, size):
    path = saved / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    assert "truncated" in refused(saved)


def test_a_truncated_config(saved):
    path = saved / "adapter_config.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(InputError, match="not JSON"):
        check_adapter_files(saved)  # PEFT reads the file itself before it asks us


def test_missing_tensors(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if "centre" in key)]
    save_file(tensors, path)
    assert "lacks 1 of" in refused(saved)


def test_nan_in_the_adapter(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(key for key in tensors if "slim_out" in key)][0, 0] = float("nan")
    save_file(tensors, path)
    assert "NaN" in refused(saved)


def test_a_config_can_be_used_for_two_models():
    config = tiny.config()
    first = peft.get_peft_model(tiny.llama(), config)
    second = peft.get_peft_model(tiny.llama(hidden_size=32), config)
    assert first(**tiny.batch()).loss.isfinite() and second(**tiny.batch()).loss.isfinite()
    assert torch.is_tensor(second(**tiny.batch()).logits)
