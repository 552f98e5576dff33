"""What PEFT promises of any tuner, held for SLIM on models of several kinds.

The cases are those that PEFT tests its own tuners with, as far as they apply to a tuner that lives
outside it and cannot be merged. Each is written against PEFT's documented behaviour.
"""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from budwood.errors import InputError, MergeError, UnsupportedModelError
from budwood.tune import SlimConfig, SlimLinear, export_lora, observe
from tests import tiny_llm as tiny
from tests import tiny_moe
from tests.tiny_llm import logits

_IDS = {"vocab_size": tiny.N_WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2():
    sizes = {"n_embd": 24, "n_inner": 40, "n_layer": 3, "n_head": 4, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**_IDS, **sizes, **off))


def opt():
    sizes = {"hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"word_embed_proj_dim": 24, "max_position_embeddings": 64, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**_IDS, **sizes, **more))


def phi3():
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return Phi3ForCausalLM(Phi3Config(**_IDS, **sizes, **heads))


KINDS = {
    "llama": tiny.llama,
    "gpt2": gpt2,  # Conv1D
    "opt": opt,  # with biases
    "phi3": phi3,  # gate and up as one layer
    "qwen2_moe": lambda: tiny_moe.model("qwen2_moe"),
}


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return KINDS[kind]().to(dtype).eval()


def slim(kind, **changes):
    return tiny.slim(make(kind), **changes)


@pytest.fixture(scope="module", params=sorted(KINDS))
def trained(request):
    """A kind and a trained model of it, which tests leave as it is."""
    return request.param, tiny.trained(model=make(request.param))


every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


# --- Weights at the start ------------------------------------------------------------------------


@every_kind
def test_a_is_random_and_b_zero(kind):
    model = slim(kind)
    assert layers(model)
    for layer in layers(model):
        a, b = layer.weights("default")
        assert a.std() > 0 and not b.any()
        bound = layer.in_features**-0.5
        assert a.abs().max() <= bound and a.abs().max() > 0.9 * bound
    assert torch.equal(logits(model), logits(make(kind)))


@every_kind
def test_adapters_are_made_alike_from_one_seed(kind):
    one, other = tiny.states(slim(kind)), tiny.states(slim(kind))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# --- Saving and loading --------------------------------------------------------------------------


def test_keys_of_a_saved_adapter(trained, tmp_path):
    _, model = trained
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    found = peft.get_peft_model_state_dict(model)
    assert saved.keys() == found.keys()
    assert all(key.startswith("base_model.model.") and ".slim_" in key for key in saved)
    assert not any("default" in key or key.endswith("base_layer.weight") for key in saved)
    model.add_adapter("other", tiny.config())
    assert peft.get_peft_model_state_dict(model).keys() == found.keys()
    model.delete_adapter("other")


def test_loading_a_state_dict_leaves_nothing_over(trained):
    kind, model = trained
    fresh = slim(kind)
    result = peft.set_peft_model_state_dict(fresh, tiny.states(model))
    assert not result.unexpected_keys and not any("slim" in key for key in result.missing_keys)
    assert torch.equal(logits(fresh.eval()), logits(model))


@pytest.mark.parametrize("safe", [True, False])
def test_both_file_formats(trained, tmp_path, safe):
    kind, model = trained
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = peft.PeftModel.from_pretrained(make(kind), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_loaded_adapter_can_be_trained_on(trained, tmp_path):
    kind, model = trained
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(kind), tmp_path, is_trainable=True)
    names = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert names and all(".slim_" in name for name in names)
    tiny.train(loaded, 1)
    steps = [int(v) for k, v in tiny.states(loaded).items() if k.endswith("clusters.n_steps")]
    assert steps and all(step == 5 for step in steps)


def test_adapters_are_saved_one_by_one(trained, tmp_path):
    kind, model = trained
    model.add_adapter("other", tiny.config(r=2))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="invalid|selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["none"])
    model.delete_adapter("other")
    loaded = peft.PeftModel.from_pretrained(make(kind), tmp_path / "other", adapter_name="third")
    assert torch.equal(logits(loaded.eval()), logits(make(kind)))


@every_kind
def test_injection_without_a_peft_model(kind):
    base = make(kind)
    expected = logits(base)
    torch.manual_seed(1)
    model = peft.inject_adapter_in_model(tiny.config(), base)
    assert type(model) is type(base) and layers(model)
    assert torch.equal(logits(model), expected)
    states = peft.get_peft_model_state_dict(model)
    assert states and peft.set_peft_model_state_dict(model, states).unexpected_keys == []


# --- Switching -----------------------------------------------------------------------------------


def test_disabled_is_the_base_model(trained):
    kind, model = trained
    expected, found = logits(make(kind)), logits(model)
    assert (found - expected).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        assert model.get_model_status().enabled is False
    assert torch.equal(logits(model), found)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), found)


def test_generation_disabled_is_that_of_the_base_model(trained):
    kind, model = trained
    data = {k: v for k, v in tiny.batch(padding="left").items() if k != "labels"}
    expected = make(kind).generate(**data, max_new_tokens=4)
    with model.disable_adapter():
        assert torch.equal(model.generate(**data, max_new_tokens=4), expected)
    assert torch.equal(
        model.generate(**data, max_new_tokens=4),
        model.generate(data["input_ids"], max_new_tokens=4, attention_mask=data["attention_mask"]),
    )


def test_adapters_are_added_switched_and_deleted(trained):
    kind, model = trained
    model, first = copy.deepcopy(model), logits(trained[1])
    base = logits(make(kind))
    model.add_adapter("second", tiny.config(r=2))
    with pytest.raises(ValueError, match="second"):
        model.add_adapter("second", tiny.config())
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert model.active_adapters == ["second"] and torch.equal(logits(model), base)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".second." in name for name in trainable)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")  # the active one: another takes its place
    assert model.active_adapters == ["default"] and torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("second")
    model.add_adapter("second", tiny.config())
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), base)
    assert not any(".default" in key for key in model.state_dict())


def test_deleting_the_last_adapter_leaves_the_base_model(trained):
    kind, model = trained
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(make(kind)))


def test_gradients_are_set_by_name(trained):
    _, model = trained
    model = copy.deepcopy(model)
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default", True)
    assert any(p.requires_grad for p in model.parameters())


def test_status_of_model_and_layers(trained):
    kind, model = trained
    status = model.get_model_status()
    assert status.peft_types == {"default": "SLIM"} and status.adapter_model_type == "SlimModel"
    assert status.base_model_type == type(make(kind)).__name__
    assert status.num_adapter_layers == len(layers(model))
    assert status.enabled is True and status.active_adapters == ["default"]
    assert status.merged_adapters == [] and status.requires_grad == {"default": True}
    assert status.available_adapters == ["default"] and status.devices == {"default": ["cpu"]}
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.trainable_params == n_trained == model.get_nb_trainable_parameters()[0]
    for one, layer in zip(model.get_layer_status(), layers(model), strict=True):
        assert one.module_type == f"slim.{type(layer).__name__}"
        assert one.available_adapters == ["default"] and one.requires_grad == {"default": True}
    assert str(model.peft_config["default"].peft_type) == "PeftType.SLIM"
    assert f"{peft.PeftType.LORA.value} {model.peft_type.value}" == "LORA SLIM"


def test_the_status_of_a_model_without_peft_model(tmp_path):
    model = tiny.trained()
    model.save_pretrained(tmp_path)
    base = tiny.llama()
    base.load_adapter(str(tmp_path))
    status = peft.get_model_status(base)
    assert status.available_adapters == ["default"] and status.num_adapter_layers == 9


# --- Merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_and_changes_nothing(trained, way):
    _, model = trained
    expected = logits(model)
    with pytest.raises(MergeError, match="token by token"):
        getattr(model, way)()
    with pytest.raises(MergeError):
        layers(model)[0].merge()
    assert torch.equal(logits(model), expected)
    assert not model.supports_lora_conversion()


def test_unloading_gives_the_model_back(trained):
    kind, model = trained
    model = copy.deepcopy(model)
    inner = model.unload()
    plain = make(kind)
    assert not any(isinstance(module, BaseTunerLayer) for module in inner.modules())
    before = plain.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in inner.state_dict().items())
    assert torch.equal(logits(inner), logits(plain))
    assert layers(peft.get_peft_model(inner, tiny.config()))  # without a warning


# --- Training ------------------------------------------------------------------------------------


@every_kind
def test_only_the_adapter_has_gradients(kind):
    model = slim(kind)
    tiny.train(model, 1)
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (".slim_" in name), name


@pytest.mark.parametrize("reentrant", [False, True])
@every_kind
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    found = []
    for checkpointing in (False, True):
        model = tiny.trained(steps=2, model=make(kind))
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        model(**tiny.batch(seed=8)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_half_precision_bases(kind, dtype):
    base = make(kind, dtype)
    expected = logits(base)
    for automatic in (True, False):
        torch.manual_seed(1)
        model = peft.get_peft_model(
            copy.deepcopy(base), tiny.config(), autocast_adapter_dtype=automatic
        )
        of_adapter = {p.dtype for n, p in model.named_parameters() if ".slim_" in n}
        assert of_adapter == {torch.float32 if automatic else dtype}
        assert torch.equal(logits(model.eval()), expected)
        if dtype == torch.bfloat16:
            losses = tiny.train(model, 4, same=True)
            assert losses[-1] < losses[0]
        statistics = [v for k, v in tiny.states(model).items() if k.endswith("centre")]
        assert statistics and all(value.dtype == torch.float32 for value in statistics)


@every_kind
def test_casting_a_model(kind):
    model = tiny.trained(model=make(kind))
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
    assert logits(model.float()).isfinite().all()


# --- Options -------------------------------------------------------------------------------------


@every_kind
def test_dropout_acts_in_training_alone(kind):
    model = tiny.trained(model=make(kind), dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(**tiny.batch()).logits)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        model(**tiny.batch()).loss.backward()
        layers(model)[0].keeper.forget_gathered()
        grads.append([layer.weights("default")[0].grad.clone() for layer in layers(model)])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*grads))


def test_dropout_leaves_the_router_alone():
    model = tiny.trained(dropout=0.9, merging=False)
    layer = layers(model)[0].train()
    x, seen = torch.randn(30, tiny.D_MODEL), []
    now = layer._begin("default", None)
    for seed in (1, 2):
        torch.manual_seed(seed)
        a, _ = layer.weights("default")
        seen.append(layer._route(x, a, now, None, None, lambda x, w, side: x @ w.T))
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0], seen[1][0])


@every_kind
def test_dropout_is_a_module_that_trainers_find(kind):
    """TRL's DPO switches dropout off for the policy and its reference, by the modules' class."""
    model = tiny.trained(model=make(kind), dropout=0.5).train()
    assert not any("dropout" in key for key in tiny.states(model))
    found = [one for layer in layers(model) for one in layer.slim_dropout.values()]
    assert all(type(one) is torch.nn.Dropout for one in found)
    assert len(found) == len(layers(model))
    for one in found:
        one.p = 0
    one, other = (model(**tiny.batch()).logits for _ in range(2))
    assert torch.equal(one, other)


def test_dropout_of_a_second_adapter():
    model = tiny.trained(dropout=0.5)
    model.add_adapter("second", tiny.config())
    model.add_adapter("third", tiny.config(dropout=0.3, yielding=False))
    for layer in layers(model):
        assert {name: getattr(one, "p", 0) for name, one in layer.slim_dropout.items()} == {
            "default": 0.5,
            "second": 0,
            "third": 0.3,
        }
    model.set_adapter("third")
    for layer in layers(model):
        torch.nn.init.ones_(layer.weights("third")[1])
    assert torch.equal(logits(model), logits(model))  # the model is in evaluation
    model.set_adapter("default")
    model.delete_adapter("third")
    assert all(set(layer.slim_dropout) == {"default", "second"} for layer in layers(model))


def test_ranks_of_their_own(tmp_path):
    options = {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"up_proj": 1.0}}
    model = tiny.trained(**options)
    for layer in layers(model):
        config = layer.slim_config["default"]
        last = layer.slim_key.rpartition(".")[2]
        r = 1 if last == "down_proj" else 3
        assert layer.weights("default")[1].shape[1] == 4 * r
        assert config.scale == pytest.approx(1 / 3 if last == "up_proj" else 2.0)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert export_lora(model, [tiny.batch()], tmp_path / "lora").rank == 12
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
        tiny.slim(rank_pattern={"nothing": 2})


def test_rank_stabilised_scaling_scales_the_experts():
    plain, stable = (tiny.slim(use_rslora=switch, yielding=False) for switch in (False, True))
    layer, other = layers(plain)[0], layers(stable)[0]
    x = torch.randn(5, tiny.D_MODEL)
    for one in (layer, other):
        torch.nn.init.ones_(one.weights("default")[1])
    with torch.no_grad():
        base = layer.base_layer(x)
        torch.testing.assert_close(
            other(x) - base, (layer(x) - base) * 3**0.5, rtol=1e-4, atol=1e-5
        )


def test_a_bias_of_the_experts(tmp_path):
    model = tiny.trained(expert_bias=True)
    layer = layers(model)[0]
    config, (_, b) = layer.slim_config["default"], layer.weights("default")
    assert b.shape[1] == config.rank + 1 and b[:, -1].abs().max() > 0
    x = torch.randn(6, tiny.D_MODEL)
    x[:2] *= 1e4  # these bypass
    with torch.no_grad(), observe(model) as seen:
        found, base = layer(x), layer.base_layer(x)
        bias = b[:, -1].clone()
        b[:, -1] = 0
        without = layer(x)
        b[:, -1] = bias
    assert torch.equal(found[:2], base[:2]) and seen.rows()[0]["bypassed_share"] >= 2 / 6
    there = bias.abs() > 0.5 * bias.abs().max()
    ratio = ((found - without)[2:] / bias)[
        :, there
    ]  # weight on LoRA experts, times the mask's mean
    assert (ratio - ratio.mean(-1, keepdim=True)).abs().max() < 1e-3
    assert 0.1 < ratio.max() <= 0.5**0.5 + 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(InputError, match="biases"):
        export_lora(model, [tiny.batch()], tmp_path / "lora")


def test_trainable_tokens(tmp_path):
    model = tiny.slim(trainable_token_indices=[5, 7])
    tiny.train(model, 4)
    found = logits(model.eval())
    embedding = model.base_model.model.model.embed_tokens
    changed = embedding.token_adapter.trainable_tokens_delta["default"]
    assert changed.shape == (2, tiny.D_MODEL)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), found)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny.llama()))
    plain = model.unload()
    assert torch.equal(logits(plain), logits(tiny.llama()))


def test_excluded_modules():
    model = tiny.slim(exclude_modules=["up_proj"])
    assert {layer.slim_key.rpartition(".")[2] for layer in layers(model)} == {
        "gate_proj",
        "down_proj",
    }


def test_a_refused_adapter_leaves_the_model_as_it_was():
    base = tiny.llama()
    before, expected = dict(base.named_modules()), logits(base)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="Embedding"):
            tiny.slim(base, target_modules=["up_proj", "embed_tokens"])
    assert dict(base.named_modules()) == before and torch.equal(logits(base), expected)
    model = tiny.trained()
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedModelError, match="Embedding"):
        model.add_adapter("other", tiny.config(target_modules=["q_proj", "norm", "embed_tokens"]))
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), expected)


def test_all_linear_layers():
    names = {
        one.slim_key.rpartition(".")[2] for one in layers(tiny.slim(target_modules="all-linear"))
    }
    assert {"q_proj", "o_proj", "up_proj"} <= names and "lm_head" not in names


# --- Layers that a model does not call -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_layers_that_mamba_does_not_call_are_refused(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4}
    if kind == "mamba2":
        sizes |= {"num_heads": 6, "head_dim": 8, "n_groups": 1}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with pytest.raises(UnsupportedModelError, match="out_proj.*reads its weight") as error:
        tiny.slim(base, target_modules=["in_proj", "out_proj"])
    assert "exclude_modules=['out_proj']" in str(error.value) and "\n" not in str(error.value)
    if kind != "mamba2":
        with pytest.raises(UnsupportedModelError, match="x_proj"):
            tiny.slim(base, target_modules=["x_proj"])
    model = tiny.slim(base)
    assert {one.slim_key.rpartition(".")[2] for one in layers(model)} == {"in_proj"}
    losses = tiny.train(model, 5, same=True)
    assert losses[-1] < losses[0]


# --- The card of a saved adapter -----------------------------------------------------------------


def test_the_card_says_how_to_load(tmp_path):
    model = tiny.trained(steps=1)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Load this adapter") == 1 and "import budwood.tune" in card
    assert "KeyError: 'SLIM'" in card and "library_name: peft" in card
    assert card.index("## Load this adapter") < card.index("## Model Details")


def test_the_card_of_an_adapter_with_a_name_is_above_it(tmp_path):
    model = peft.get_peft_model(tiny.llama(), tiny.config(), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert "import budwood.tune" in (tmp_path / "README.md").read_text()


def test_a_config_alone_writes_no_card_and_changes_no_readme(tmp_path):
    SlimConfig().save_pretrained(str(tmp_path))
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("# My project\n\n## Notes\n")
    SlimConfig().save_pretrained(str(tmp_path / "config"))
    SlimConfig().save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "# My project\n\n## Notes\n"


def test_bad_target_modules_name_the_layers_there_are():
    with pytest.raises(InputError, match="linear layers: .*up_proj"):
        tiny.slim(target_modules=["nothing"])
