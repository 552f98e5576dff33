"""Bad options are refused in one line; target modules are found for every architecture."""

from __future__ import annotations

import dataclasses
import json
import re

import peft
import peft.utils.constants as peft_constants
import pytest
from torch import nn

from budwood.errors import InputError, OptionError, UnknownNameError, UnsupportedModelError
from budwood.tune import SlimConfig
from budwood.tune.slim.architectures import MLP_TARGETS, default_targets, siblings
from tests import tiny_llm as tiny

BAD = [
    ({"n_experts": 0}, "identity experts alone add nothing"),
    ({"n_experts": 0, "n_identity": 0}, "at least 1 LoRA expert"),
    ({"top_k": 11}, "8 LoRA \\+ 2 identity = 10"),
    ({"top_k": 0}, "top_k=0"),
    ({"r": 0}, "r=0"),
    ({"r": 2.5}, "r=2.5"),
    ({"n_identity": -1}, "n_identity=-1"),
    ({"n_clusters": 0}, "n_clusters=0"),
    ({"momentum": 0.0}, "momentum=0.0"),
    ({"momentum": float("nan")}, "momentum=nan"),
    ({"merge_p": 1.0}, "merge_p=1.0"),
    ({"skip_first": 1.0}, "skip_first=1.0"),
    ({"n_directions": 0}, "n_directions=0"),
    ({"beta": -1.0}, "beta=-1.0"),
    ({"l1": float("nan")}, "l1=nan"),
    ({"alpha": float("inf")}, "alpha=inf"),
    ({"margin": float("nan")}, "margin=nan"),
    ({"margin_inference": "1"}, "margin_inference='1'"),
    ({"margin_inference": float("inf")}, "margin_inference=inf"),
    ({"slim_version": 9}, "upgrade budwood"),
    ({"yielding": "no"}, "yielding='no'; give True or False"),
    ({"router": "off"}, "router='off'; give True or False"),
    ({"clustering": 1}, "clustering=1; give"),
    ({"merging": None}, "merging=None; give"),
    ({"merge_rescale": "yes"}, "merge_rescale='yes'; give"),
    ({"n_experts": "8"}, "n_experts='8'; give an int"),
    ({"alpha": "8"}, "alpha='8'; give a number"),
    ({"skip_first": "half"}, "skip_first='half'; give a fraction"),
    ({"seed": "x"}, "seed='x'; give an int"),
    ({"dropout": 1.0}, "dropout=1.0; give a fraction"),
    ({"use_rslora": 1}, "use_rslora=1; give True or False"),
    ({"rank_pattern": {"up_proj": 0}}, "rank_pattern\\['up_proj'\\]=0"),
    ({"alpha_pattern": {"up_proj": -1}}, "alpha_pattern\\['up_proj'\\]=-1"),
]


@pytest.mark.parametrize(("changes", "text"), BAD, ids=str)
def test_bad_values_are_refused_in_one_line(changes, text):
    with pytest.raises(InputError, match=text) as error:
        SlimConfig(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"distance": "mean"}, {"fit_on": "prompts"}, {"merge_inference": "dare"}]
)
def test_unknown_names(changes):
    with pytest.raises(UnknownNameError, match="give "):
        SlimConfig(**changes)


def test_defaults():
    config = SlimConfig()
    assert (config.n_experts, config.n_identity, config.top_k) == (8, 2, 2)  # the paper's
    assert (config.r, config.alpha, config.scale) == (4, None, 2.0)
    assert (config.n_clusters, config.momentum, config.merge_p) == (8, 0.05, 0.5)
    assert config.peft_type == "SLIM" and config.peft_type.value == config.peft_type.name == "SLIM"


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (0.5, 0.125), (3, 0.75)])
def test_alpha_over_r_scales(alpha, scale):
    config = SlimConfig(r=4, alpha=alpha)
    assert (config.alpha, config.scale) == (alpha, scale)
    assert dataclasses.replace(config, r=8).scale == (2.0 if alpha is None else scale / 2)


@pytest.mark.parametrize(
    ("n_tokens", "distance", "n_directions", "margin"),
    [
        (0, "whitened", 8, 1.5),
        (31, "whitened", 8, 1.5),
        (32, "discriminant", 8, 1.0),
        (160, "discriminant", 16, 1.0),
        (1279, "discriminant", 127, 1.0),
        (1280, "discriminant", 128, 1.0),
        (10**6, "discriminant", 128, 1.0),
    ],
)
def test_the_recommended_config_follows_the_amount_of_data(
    n_tokens, distance, n_directions, margin
):
    config = SlimConfig.recommended(n_tokens)
    assert (config.r, config.alpha, config.task_type) == (4, 16.0, "CAUSAL_LM")
    assert (config.distance, config.n_directions) == (distance, n_directions)
    assert config.margin_of(training=True) == config.margin_of(training=False) == margin
    fixed = ("fixed", "content", 0.2) if n_tokens >= 32 else ("running", "supervised", 0.4)
    assert (config.boundary, config.fit_on, config.skip_first) == fixed
    assert not config.merging


def test_options_take_precedence_over_the_recommended_ones():
    config = SlimConfig.recommended(50, r=2, distance="discriminant", n_directions=5, seed=3)
    assert (config.r, config.alpha, config.n_directions, config.seed) == (2, 16.0, 5, 3)
    assert config.boundary == "fixed" and config.margin_of(training=False) == 1.0
    config = SlimConfig.recommended(50, boundary="running", merging=True, alpha=3)
    assert config.merging and config.alpha == 3 and config.fit_on == "supervised"
    assert (config.margin_of(training=True), config.margin_of(training=False)) == (1.5, 1.0)
    assert SlimConfig.recommended(50, distance="max").boundary == "running"
    config = SlimConfig.recommended(5000, margin=0.5, fit_on="all", skip_first=0)
    assert (config.boundary, config.fit_on, config.skip_first) == ("fixed", "all", 0)
    assert config.margin_of(training=True) == config.margin_of(training=False) == 0.5
    config = SlimConfig.recommended(5000, boundary="running", margin=0.5)
    assert config.distance == "discriminant" and config.margin_of(training=False) == 0.5
    assert SlimConfig.recommended(5000, distance="max", margin_inference=0).margin_inference == 0
    for wrong in (-1, 2.5, None, True):
        with pytest.raises(InputError, match=f"n_supervised_tokens={wrong}.* at least 0"):
            SlimConfig.recommended(wrong)


@pytest.mark.parametrize("distance", ["whitened", "max", "rms"])
def test_only_a_distance_that_knows_other_text_has_a_fixed_boundary(distance):
    with pytest.raises(InputError, match=f"boundary='fixed' and distance='{distance}', which does"):
        SlimConfig(distance=distance, boundary="fixed")


def test_what_the_user_wrote_is_known_before_training_alone():
    with pytest.raises(InputError, match="fit_on='content' takes boundary='fixed'"):
        SlimConfig(fit_on="content", distance="discriminant")
    assert SlimConfig(fit_on="content", distance="discriminant", boundary="fixed")


def test_a_config_can_be_saved_alone(tmp_path):
    config = SlimConfig.recommended(5000, target_modules=["down_proj"], l1=0.5)
    config.save_pretrained(str(tmp_path))
    for kind in (SlimConfig, peft.PeftConfig):
        assert kind.from_pretrained(str(tmp_path)) == config
    of_an_adapter = SlimConfig(base={"model_type": "llama"})
    of_an_adapter.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="has no adapter_model.safetensors"):
        SlimConfig.from_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        SlimConfig.from_pretrained(str(tmp_path))


def test_the_spelling_of_older_adapters_is_read():
    assert SlimConfig(fit_on="learnt") == SlimConfig(fit_on="supervised") == SlimConfig()


def test_every_architecture_that_peft_knows_has_targets():
    known = set()
    for name in dir(peft_constants):
        if re.fullmatch(r"TRANSFORMERS_MODELS_TO_\w+_TARGET_MODULES_MAPPING", name):
            known |= set(getattr(peft_constants, name))
    composite = {"llava": {"model_type": "llava", "text_config": {"model_type": "llama"}}}
    for kind in known:
        assert default_targets(composite.get(kind, {"model_type": kind}))
        assert kind in MLP_TARGETS or kind in composite


NAMES = [
    ("llama", ["model.layers.0.mlp.up_proj"], ["model.layers.0.self_attn.q_proj", "lm_head"]),
    ("gpt2", ["transformer.h.0.mlp.c_proj"], ["transformer.h.0.attn.c_proj"]),
    (
        "bert",
        ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"],
        ["bert.encoder.layer.0.attention.output.dense"],
    ),
    (
        "t5",
        ["encoder.block.0.layer.1.DenseReluDense.wi_0"],
        ["decoder.block.0.layer.0.SelfAttention.o"],
    ),
    ("gemma4", ["model.language_model.layers.0.mlp.up_proj"], ["model.vision_tower.0.mlp.up_proj"]),
    ("opt", ["model.decoder.layers.0.fc1"], ["model.decoder.layers.0.self_attn.out_proj"]),
]


@pytest.mark.parametrize(("kind", "inside", "outside"), NAMES)
def test_targets_are_the_mlp_and_nothing_else(kind, inside, outside):
    pattern = default_targets({"model_type": kind})
    assert all(re.fullmatch(pattern, name) for name in inside)
    assert not any(re.fullmatch(pattern, name) for name in outside)


def test_targets_of_a_vision_language_model_are_in_its_language_model():
    pattern = default_targets({"model_type": "llava", "text_config": {"model_type": "qwen2"}})
    assert re.fullmatch(pattern, "model.language_model.layers.0.mlp.gate_proj")
    assert not re.fullmatch(pattern, "model.vision_tower.encoder.layers.0.mlp.gate_proj")


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UnsupportedModelError, match="model_type 'sage'.*target_modules"):
        default_targets({"model_type": "sage"})


def test_siblings_read_the_same_input():
    assert siblings("up_proj") == ("gate_proj",) and siblings("down_proj") == ()


def test_a_model_without_config_takes_named_targets():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    found = peft.get_peft_model(model, SlimConfig(r=2, n_clusters=2, target_modules=["0"]))
    assert type(found.base_model.model[0]).__name__ == "SlimLinear"


HINTS = [
    ("lora_alpha", 16, "'lora_alpha': it is called alpha here"),
    ("lora_dropout", 0.1, "it is called dropout here"),
    ("rank", 8, "it is called r here"),
    ("bias", "all", "expert_bias=True"),
    ("use_dora", True, "no magnitude vector"),
    ("init_lora_weights", "pissa", "B at zero"),
    ("target_module", ["up_proj"], "did you mean 'target_modules'"),
    ("n_expert", 4, "did you mean 'n_experts'"),
    ("zzz", 1, "'zzz'; known: r, alpha, n_experts"),
]


@pytest.mark.parametrize(("name", "value", "hint"), HINTS, ids=str)
def test_an_unknown_option_gets_a_hint(name, value, hint):
    for make in (SlimConfig, lambda **options: SlimConfig.recommended(5000, **options)):
        with pytest.raises(OptionError, match="unexpected keyword argument") as error:
            make(**{name: value})
        assert hint in str(error.value) and "\n" not in str(error.value)
        assert isinstance(error.value, (TypeError, ValueError))


def test_the_config_of_a_newer_version_is_read_with_a_warning(tmp_path):
    SlimConfig(r=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "invented": 1}))
    with pytest.warns(UserWarning, match="invented"):
        assert SlimConfig.from_pretrained(str(tmp_path)) == SlimConfig(r=3)


def test_rank_stabilised_scaling():
    assert SlimConfig(r=16, alpha=32, use_rslora=True).scale == 8.0
    assert SlimConfig(r=16, alpha=32).scale == 2.0


def test_patterns_give_layers_ranks_of_their_own():
    config = SlimConfig(
        r=4,
        rank_pattern={"down_proj": 2, r"layers\.1\..*up_proj": 6},
        alpha_pattern={"up_proj": 1.0},
    )
    found = {
        key: (config.for_layer(key).r, config.for_layer(key).scale)
        for key in ("m.layers.0.gate_proj", "m.layers.0.down_proj", "m.layers.1.mlp.up_proj")
    }
    assert list(found.values()) == [(4, 2.0), (2, 2.0), (6, 1 / 6)]
    assert config.for_layer("m.layers.0.gate_proj") is config


@pytest.mark.parametrize("alpha", [3.0, 16, 16.0])
def test_alpha_is_that_of_every_rank_as_in_lora(alpha):
    options = {"r": 8, "rank_pattern": {"down_proj": 2}}
    config = SlimConfig(alpha=alpha, **options)
    lora = peft.LoraConfig(lora_alpha=alpha, target_modules=["up_proj", "down_proj"], **options)
    model = peft.get_peft_model(tiny.llama(), lora).base_model.model.model.layers[0].mlp
    for name in ("up_proj", "down_proj"):
        scale = getattr(model, name).scaling["default"]
        assert config.for_layer(f"layers.0.mlp.{name}").scale == scale


@pytest.mark.parametrize("alpha", [None, 6.0, 5.0])
def test_alpha_is_saved_as_it_was_given(alpha, tmp_path):
    config = SlimConfig(r=3, alpha=alpha, rank_pattern={"down_proj": 2})
    config.save_pretrained(str(tmp_path))
    found = SlimConfig.from_pretrained(str(tmp_path))
    assert found == config and found.alpha == alpha


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 2.0), (5.0, 2.5)])
@pytest.mark.parametrize("version", [1, 2])
def test_alpha_of_older_formats_follows_the_rank_where_it_is_twice_r(version, alpha, scale):
    config = SlimConfig(r=3, alpha=alpha, rank_pattern={"x": 2}, slim_version=version)
    assert config.for_layer("x").scale == scale and config.scale == alpha / 3
    assert config.slim_version == SlimConfig().slim_version
    assert dataclasses.replace(config, alpha=6.0).for_layer("x").scale == 3.0
