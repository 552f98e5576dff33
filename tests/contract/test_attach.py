"""Attaching and detaching: what is refused, and that nothing stays behind."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import AlignVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaNextVideoConfig

from budwood.errors import (
    AttachError,
    BudgetError,
    BudwoodError,
    UnknownNameError,
    UnsupportedModelError,
)
from budwood.prune import attach
from budwood.prune.families import family_of
from budwood.prune.methods.adav_contrast import AdaVContrast
from budwood.prune.methods.scores import Common
from tests.contract import models

GREEDY = {"max_new_tokens": 3, "do_sample": False}


def state(model):
    """All that detaching has to restore: attributes, hooks and classes of every module."""
    return {
        name: (
            type(module),
            {
                key: dict(value) if key.endswith("_hooks") else value
                for key, value in module.__dict__.items()
                if key not in ("_parameters", "_buffers", "_modules")
            },
        )
        for name, module in model.named_modules()
    }


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def warm(case, batch):
    """The model after one call: transformers installs hooks of its own in the first."""
    case.model.generate(**batch, **GREEDY)
    case.model(**batch)
    return case.model


@pytest.mark.parametrize("forward", [False, True])
def test_detaching_restores_everything(warm, batch, method, forward):
    before, weights_before = state(warm), weights(warm)
    with attach(warm, keep=3, method=method, forward=forward):
        assert state(warm) != before
        warm.generate(**batch, **GREEDY)
        warm(**batch)
        during = weights(warm)
    assert state(warm) == before
    for after in (during, weights(warm)):
        assert after.keys() == weights_before.keys()
        assert all(torch.equal(after[name], weights_before[name]) for name in after)


def test_nothing_is_hooked_between_calls(warm, batch):
    before = state(warm)
    with attach(warm, keep=3):
        warm.generate(**batch, **GREEDY)
        during = state(warm)
        root = during[""][1]
        assert root.pop("generate").budwood_session is not None
        root.pop("rope_deltas", None)
        during.get("model", (0, {}))[1].pop("rope_deltas", None)
        before.get("model", (0, {}))[1].pop("rope_deltas", None)
        assert during == before


def test_classes_are_never_touched(case):
    kind = type(case.model)
    generate, forward = kind.generate, kind.forward
    with attach(case.model, keep=3, forward=True):
        assert kind.generate is generate
        assert kind.forward is forward
        assert "generate" in vars(case.model)
    assert "generate" not in vars(case.model)


def test_an_error_in_the_block_leaves_a_clean_model(warm, batch):
    before = state(warm)
    with pytest.raises(KeyError), attach(warm, keep=3, forward=True):
        raise KeyError("a user's own mistake")
    assert state(warm) == before


@pytest.mark.parametrize("place", ["encoder", "saliency", "llm"])
def test_an_error_in_generate_leaves_a_clean_model(case, warm, batch, place, monkeypatch):
    before = state(warm)

    def fail(*args, **kwargs):
        raise ZeroDivisionError(place)

    with attach(warm, keep=3) as session:
        with monkeypatch.context() as patch:
            if place == "encoder":
                patch.setattr(type(warm.model), "get_image_features", fail)
            elif place == "saliency":
                patch.setattr(session.pruner.family, "saliency", fail)
            else:
                patch.setattr(type(case.llm), "forward", fail)
            with pytest.raises(ZeroDivisionError, match=place):
                warm.generate(**batch, **GREEDY)
        warm.generate(**batch, **GREEDY)  # and it goes on working
        assert len(session.report) == 3
    assert state(warm) == before


@pytest.mark.parametrize("forward", [False, True])
def test_attaching_twice_is_an_error(case, batch, forward):
    with attach(case.model, keep=3, forward=forward) as session:
        with pytest.raises(AttachError, match="already attached to.*keep=3"):
            attach(case.model, keep=2)
        case.model.generate(**batch, **GREEDY)
        assert session.report[0].n_after == 3
    with attach(case.model, keep=2):
        pass


def test_a_session_can_be_detached_by_hand_and_not_used_again(case):
    session = attach(case.model, keep=3)
    session.detach()
    session.detach()
    assert "generate" not in vars(case.model)
    with pytest.raises(AttachError, match="detached"), session:
        pass


def test_a_generate_of_the_models_own_comes_back(case):
    def own(*args, **kwargs):
        return "own"

    case.model.generate = own
    try:
        with attach(case.model, keep=3):
            assert case.model.generate is not own
            assert case.model.generate() == "own"
        assert case.model.generate is own
    finally:
        del case.model.generate


def test_a_wrapper_with_a_base_model_works(case, batch):
    class Wrapper(torch.nn.Module):  # as PEFT has it
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_base_model(self):
            return self.inner

        def generate(self, **kwargs):
            return self.inner.generate(**kwargs)

    with attach(case.model, keep=3):
        direct = case.model.generate(**batch, **GREEDY)
    wrapper = Wrapper(case.model)
    with attach(wrapper, keep=3) as session:
        assert torch.equal(wrapper.generate(**batch, **GREEDY), direct)
        assert len(session.report) == 3
        with pytest.raises(AttachError):
            attach(case.model, keep=3)
    assert "generate" not in vars(case.model)


def test_accelerate_hooks_are_kept(case, batch):
    with attach(case.model, keep=3, forward=True):
        bare = case.model(**batch).logits
    add_hook_to_module(case.model, ModelHook())
    try:
        hooked = vars(case.model)["forward"]
        with attach(case.model, keep=3, forward=True) as session:
            assert torch.equal(case.model(**batch).logits, bare)
            assert len(session.report) == 3
        assert vars(case.model)["forward"] is hooked
    finally:
        remove_hook_from_module(case.model)


def test_the_report_outlives_the_session(case, batch):
    with attach(case.model, keep=3) as session:
        case.model.generate(**batch, **GREEDY)
    assert [image.n_after for image in session.report] == [3, 3, 3]


def test_bad_arguments_are_found_when_attaching(case):
    for options, error, message in (
        ({"keep": 0}, BudgetError, "keep=0"),
        ({"keep": 1.5}, BudgetError, "keep=1.5"),
        ({"method": "adv"}, UnknownNameError, "did you mean 'adav'"),
        ({"question": "trun"}, UnknownNameError, "'all' or 'turn'"),
        ({"compat": "oficial"}, BudwoodError, "compat"),
        ({"method": "adav-official:n_crops=3"}, BudwoodError, "n_crops|cannot run"),
        ({"compat": "official", "method": "uniform"}, BudwoodError, "compat"),
    ):
        with pytest.raises(error, match=message):
            attach(case.model, **options)
        assert "generate" not in vars(case.model)


def test_a_model_without_vision_is_refused():
    llama = LlamaForCausalLM(LlamaConfig(**models.TEXT))
    with pytest.raises(UnsupportedModelError, match="'llama'.*no vision"):
        attach(llama)
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        attach(torch.nn.Linear(2, 3))


def test_a_vision_model_of_no_family_is_refused(case):
    class Other(torch.nn.Module):
        config = LlavaNextVideoConfig()

    with pytest.raises(
        UnsupportedModelError, match="'llava_next_video', did you mean 'llava_next'"
    ):
        attach(Other())


def test_a_model_that_does_not_generate_is_refused(case):
    with pytest.raises(UnsupportedModelError, match="ForConditionalGeneration"):
        attach(case.model.model)


def test_an_unknown_tower_or_layer_is_refused(cases):
    model = cases["llava"].model
    config = model.config
    model.config = copy.deepcopy(config)
    try:
        for layer in (0, 5, -5, [-2, 0]):
            model.config.vision_feature_layer = layer
            with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
                attach(model)
        model.config.vision_config.model_type = "siglip2_vision_model"
        with pytest.raises(UnsupportedModelError, match="'siglip2_vision_model'"):
            attach(model)
        model = cases["qwen2_5_vl"].model
        with pytest.raises(UnsupportedModelError, match="compat"):
            attach(model, compat="official")
    finally:
        cases["llava"].model.config = config


def test_a_replaced_tower_is_refused(case):
    name, tower = case.tower, getattr(case.model.model, case.tower)
    setattr(case.model.model, name, torch.nn.Identity())
    try:
        with pytest.raises(UnsupportedModelError, match="not built as transformers builds it"):
            attach(case.model)
    finally:
        setattr(case.model.model, name, tower)


def test_a_replaced_attention_is_refused(case):
    read = family_of(case.model).recorder({}).module
    name = "qkv" if hasattr(read, "qkv") else "q_proj"
    projection = getattr(read, name)
    delattr(read, name)
    try:
        with pytest.raises(UnsupportedModelError, match=f"has no {name} to read saliency from"):
            attach(case.model)
    finally:
        setattr(read, name, projection)


def test_a_tower_of_another_kind_is_refused(case):
    name = case.tower
    tower = getattr(case.model.model, name)
    config = tower.config
    tower.config = AlignVisionConfig()
    try:
        for method in ("adav", "random"):
            with pytest.raises(UnsupportedModelError, match=f"{name} of .*'align_vision_model'"):
                attach(case.model, method=method)
    finally:
        tower.config = config


def test_no_attention_is_eager(case, batch, monkeypatch):
    """Saliency is read beside SDPA, in the encoder and in the LLM."""

    def refuse(*args, **kwargs):
        raise ZeroDivisionError("eager attention ran")

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and hasattr(module, "eager_attention_forward"):
            monkeypatch.setattr(module, "eager_attention_forward", refuse)
    with attach(case.model, keep=3):
        case.model.generate(**batch, **GREEDY)
        before = case.model.config._attn_implementation
        case.model.set_attn_implementation("eager")
        try:
            with pytest.raises(ZeroDivisionError, match="eager"):
                case.model.generate(**batch, **GREEDY)
        finally:
            case.model.set_attn_implementation(before)


def test_attach_tells_a_method_what_words_have_in_common(case, batch):
    given = AdaVContrast(common=Common.of(case.model.get_input_embeddings().weight[:20]))
    for method in ("adav-contrast", AdaVContrast()):
        with attach(case.model, keep=3, method=method) as session:
            fitted = session.pruner.method.common
            case.model.generate(**batch, **GREEDY)
        embed = case.model.get_input_embeddings()
        words = embed(torch.arange(embed.num_embeddings))  # Gemma scales them
        assert len(words) <= 1024  # so that the sample is all of them
        torch.testing.assert_close(fitted.mean, words.mean(0))
    with attach(case.model, keep=3, method=given) as session:
        assert session.pruner.method is given
