"""A SLIM adapter is a PEFT adapter: made, saved, loaded, switched and deleted like any other."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from budwood.errors import InputError, MergeError
from budwood.tune import SlimLinear, fit_discriminant, observe
from budwood.tune.slim.architectures import layer_number
from tests import tiny_chat
from tests import tiny_llm as tiny
from tests.tiny_llm import logits, states


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def test_only_the_mlp_is_adapted_and_only_the_adapter_is_trained():
    model = tiny.slim()
    assert {layer.slim_key.rsplit(".", 1)[1] for layer in layers(model)} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ends = (".slim_in.default.weight", ".slim_out.default.weight")
    assert len(trained) == 18 and all(name.endswith(ends) for name in trained)


def test_everything_of_an_adapter_is_found_by_its_name():
    """As TRL finds what it copies: ``".default."`` in the name of a tensor."""
    model = tiny.trained()
    tensors = {key for key in model.state_dict() if "slim_" in key}
    assert len(tensors) == 9 * (1 + 1 + 3) + 3 * 7
    assert all(".default." in key for key in tensors)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_at_initialisation_is_the_base_models(training, dtype):
    base = tiny.llama(dtype)
    expected = logits(base)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = tiny.slim(base).train(training)
    assert torch.equal(logits(model), expected)
    inner = model.unload().state_dict()
    assert inner.keys() == before.keys()
    assert all(torch.equal(before[k], inner[k]) for k in before)


def test_training_changes_the_adapter_and_not_the_base():
    base = tiny.llama()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    expected = logits(base)
    model = tiny.slim(base)
    losses = tiny.train(model, 12, same=True)
    model.eval()
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in before.items())
    assert torch.equal(logits(plain), expected)
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_the_last_unloaded_model_takes_the_optimiser_hook_with_it():
    """In a process of its own, since models of other tests may be alive in this one."""
    code = """if True:
        from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
        from tests import tiny_llm as tiny
        counts = [len(hooks)]
        first, second = tiny.slim(), tiny.slim()
        for model in (first, second):
            counts.append(len(hooks))
            model.unload()
        assert [*counts, len(hooks)] == [0, 1, 1, 0], counts
    """
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, cwd=root)


def test_one_config_for_two_models(tmp_path):
    config = tiny.config(skip_first=0.5)
    small = peft.get_peft_model(tiny.llama(), config)
    large = peft.get_peft_model(tiny.llama(num_hidden_layers=6), config)
    assert config.target_modules is None
    assert len(layers(large)) == 3 * 3 > len(layers(small))
    small.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_statistics_are_shared_by_the_layers_of_a_block():
    first, second, third = layers(tiny.slim())[:3]
    for layer in (second, third):
        assert layer.statistics("default") is first.statistics("default")
        assert "default" not in layer.slim_clusters
    first, second, third = layers(tiny.slim(yield_at="module"))[:3]
    assert second.statistics("default") is first.statistics("default")
    assert third.statistics("default").centre.shape == (3, tiny.D_MLP)
    alone = layers(tiny.slim(target_modules=["down_proj"]))[0]
    assert alone.statistics("default").centre.shape == (3, tiny.D_MLP)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_block_yields_by_the_distance_of_its_input(reentrant):
    found = {}
    for yield_at in ("block", "module"):
        model = tiny.trained(yield_at=yield_at).train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        with observe(model) as seen:
            model(**tiny.batch()).loss.backward()
        found[yield_at] = [row["distance"] for row in seen.rows()]
    gate, up, down = found["block"][:3]
    assert gate == up == down != 0
    gate, up, down = found["module"][:3]
    assert gate == up != down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bit_equal(tmp_path, dtype):
    model = tiny.trained(model=tiny.llama(dtype))
    expected, state = logits(model), tiny.states(model)
    model.save_pretrained(tmp_path)
    state_after = tiny.states(model)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(dtype), tmp_path).eval()
    found = tiny.states(loaded)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state_after[k]) for k in state)
    assert all(v.dtype == torch.float32 for k, v in found.items() if k.endswith("centre"))
    assert torch.equal(logits(loaded), expected)
    assert any(int(v) == 4 for k, v in found.items() if k.endswith("n_steps"))


def test_the_last_step_is_saved(tmp_path):
    model = tiny.slim()
    tiny.train(model, 3)
    assert not layers(model)[0].keeper.pending
    model.save_pretrained(tmp_path)
    assert int(layers(model)[0].slim_clusters["default"].n_steps) == 3


def test_layers_that_are_one_module_at_two_places(tmp_path):
    def base():
        model = tiny.llama()
        model.model.layers[2].mlp = model.model.layers[0].mlp
        return model

    model = tiny.trained(model=base())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_loads_it_by_itself(tmp_path):
    model = tiny.trained()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny.llama().save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval()), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(tiny.llama()))
    loaded.enable_adapters()
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), logits(tiny.llama()))


def test_adapter_directory_is_enough(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = tiny.trained(model=base)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SLIM" and config["base"]["hidden_size"] == tiny.D_MODEL
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_several_adapters(tmp_path):
    model = tiny.trained()
    first = logits(model)
    model.add_adapter("second", tiny.config(r=2, n_experts=3, seed=5, target_modules=["up_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(tiny.llama()))
    tiny.train(model, 3)
    model.eval()
    second = logits(model)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded.eval()), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), second)
    assert all("default" not in key for key in loaded.state_dict())


def test_statistics_of_an_inactive_adapter_stand_still():
    model = tiny.trained()
    model.add_adapter("second", tiny.config())
    before = tiny.states(model)
    model.set_adapter("second")
    tiny.train(model, 2)
    model.eval()
    logits(model)
    after = tiny.states(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_modules_to_save(tmp_path):
    model = tiny.trained(modules_to_save=["lm_head"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(
        loaded.base_model.model.lm_head.modules_to_save["default"].weight,
        tiny.llama().lm_head.weight,
    )


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(way):
    model = tiny.trained()
    expected = logits(model)
    with pytest.raises(MergeError, match="token by token.*export_lora"):
        getattr(model, way)()
    assert torch.equal(logits(model), expected)


def test_copies_and_pickles_are_independent():
    model = tiny.trained()
    tiny.train(model, 1)
    before = {key: value.clone() for key, value in states(model).items()}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layers(copied)[0].keeper is not layers(model)[0].keeper
        assert layers(copied)[0].keeper.model is copied.base_model.model
        assert layers(copied)[1].statistics("default") is layers(copied)[0].statistics("default")
        tiny.train(copied, 2)
    assert all(torch.equal(before[key], value) for key, value in states(model).items())


def test_casting_the_model_leaves_the_statistics_alone():
    model = tiny.trained()
    logits(model)
    before = {k: v for k, v in tiny.states(model).items() if "clusters" in k}
    model.to(torch.bfloat16)
    after = tiny.states(model)
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    assert logits(model).dtype == torch.bfloat16


def test_low_memory_loading(tmp_path):
    model = tiny.trained()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded.eval()), expected)


def test_inference_mode_and_autocast():
    model = tiny.trained()
    inputs = tiny.batch()
    del inputs["labels"]
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, logits(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    assert torch.allclose(found.float(), logits(model), atol=0.1)


def test_four_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantise = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantise, device_map="cpu"
        ).eval()

    assert torch.equal(logits(tiny.slim(base()).eval()), logits(base()))
    # A pass in eval mode packs bitsandbytes' CPU weights for inference: train before any.
    grads = []
    rows = [{"input_ids": list(range(3, 40)), "labels": list(range(3, 40))}]
    for is_fitted in (False, True):
        model = tiny.slim(base(), distance="discriminant" if is_fitted else "whitened")
        if is_fitted:
            fit_discriminant(model, tiny_chat.tokenizer(), rows, rows)
        model.train()(**tiny.batch()).loss.backward()
        grads.append(
            torch.cat([one.slim_out["default"].weight.grad.flatten() for one in layers(model)])
        )
    assert torch.allclose(*grads, atol=1e-5) and grads[0].abs().max() > 1e-4
    model = tiny.slim(base())
    assert type(layers(model)[0].base_layer).__name__ == "Linear4bit"
    losses = tiny.train(model, 12, same=True)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    found = logits(model)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), found)


# --- which layers --------------------------------------------------------------------------------


def adapted(model) -> set[int | None]:
    return {layer_number(layer.slim_key) for layer in layers(model)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"skip_first": 0.0}, {0, 1, 2}),
        ({"skip_first": 0.4}, {1, 2}),
        ({"skip_first": 0.99}, {2}),
        ({"layers_to_transform": [0, 2]}, {0, 2}),
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [], "skip_first": 0.4}, {1, 2}),
        ({"layers_to_transform": [1], "target_modules": ["up_proj"]}, {1}),
        ({"skip_first": 0.4, "target_modules": ["up_proj"]}, {0, 1, 2}),
    ],
    ids=str,
)
def test_layers_that_are_adapted(options, expected, tmp_path):
    model = tiny.slim(**options)
    assert adapted(model) == expected
    model.save_pretrained(tmp_path)
    assert adapted(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)) == expected


def test_a_second_adapter_may_have_other_layers():
    model = tiny.slim(skip_first=0.4)
    model.add_adapter("other", tiny.config(skip_first=0.0))
    held = {
        name: {layer_number(x.slim_key) for x in layers(model) if name in x.slim_in}
        for name in ("default", "other")
    }
    assert held == {"default": {1, 2}, "other": {0, 1, 2}}


def test_layers_beside_a_regular_expression_are_refused():
    with pytest.raises(InputError, match="no effect beside target_modules"):
        tiny.config(target_modules=r".*up_proj", layers_to_transform=[1])
