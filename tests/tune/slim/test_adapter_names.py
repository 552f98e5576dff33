"""``adapter_names``: each row of a batch uses an adapter of its own, as in PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from budwood.errors import InputError, MergeError
from budwood.tune import observe
from budwood.tune.slim.adapter_names import BASE, owners
from budwood.tune.slim.keeper import layers_of
from tests import tiny_llm as tiny
from tests.tiny_llm import logits

NAMES = ["second", BASE, "default", "second"]


def two_adapters(base=None, **changes) -> peft.PeftModel:
    """Two trained adapters, of which the second has other sizes and fewer modules."""
    model = tiny.trained(model=base, **changes)
    model.add_adapter("second", tiny.config(r=2, n_experts=3, seed=5, **changes))
    model.set_adapter("second")
    tiny.train(model, 3, start=20)
    model.set_adapter("default")
    enlarge(model)
    return model.eval()


def enlarge(model):
    """Let both adapters matter, after the few steps that they were trained for."""
    with torch.no_grad():
        for layer in layers_of(model):
            for name in layer.slim_out:
                layer.weights(name)[1].mul_(100)


@pytest.fixture(scope="module")
def model():
    return two_adapters()


def mixed(model, data, names):
    data = {key: data[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**data, adapter_names=names).logits


def one_by_one(model, data, names):
    """Each row from a pass of the whole batch with its own adapter."""
    whole = {BASE: None, "default": None, "second": None}
    for name in ("default", "second"):
        model.set_adapter(name)
        whole[name] = logits(model, data)
    with model.disable_adapter():
        whole[BASE] = logits(model, data)
    model.set_adapter("default")
    return torch.stack([whole[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_rows_get_what_their_own_adapter_gives(model, padding):
    data = tiny.batch(padding=padding)
    found, expected = mixed(model, data, NAMES), one_by_one(model, data, NAMES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = logits(tiny.llama(), data)
    assert torch.equal(found[1], plain[1])
    assert all((found[i] - plain[i]).abs().max() > 1e-2 for i in (0, 2, 3))


def test_one_name_for_all_rows_is_that_adapter(model):
    data = tiny.batch()
    for name in ("default", "second"):
        model.set_adapter(name)
        assert torch.equal(mixed(model, data, [name] * 4), logits(model, data))
    model.set_adapter("default")
    assert torch.equal(mixed(model, data, [BASE] * 4), logits(tiny.llama(), data))
    with model.disable_adapter():
        assert torch.equal(mixed(model, data, NAMES), logits(tiny.llama(), data))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_generation(model, options):
    data = tiny.batch(padding="left")
    del data["labels"]
    many = options.get("num_return_sequences", 1)
    torch.manual_seed(3)
    found = model.generate(**data, max_new_tokens=5, adapter_names=NAMES, **options)
    assert found.shape[0] == 4 * many
    if "do_sample" in options:  # other batches draw other numbers
        return
    for name in ("default", "second"):
        model.set_adapter(name)
        alone = model.generate(**data, max_new_tokens=5, **options)
        for i in (i for i, one in enumerate(NAMES) if one == name):
            assert found[i].tolist()[: alone.shape[1]] == alone[i].tolist()[: found.shape[1]]
    model.set_adapter("default")
    plain = tiny.llama().generate(**data, max_new_tokens=5, **options)
    assert found[1].tolist()[: plain.shape[1]] == plain[1].tolist()[: found.shape[1]]
    assert not torch.equal(found[0, : plain.shape[1]], plain[0, : found.shape[1]])


def test_modules_to_save_go_with_the_adapter():
    model = two_adapters(modules_to_save=["lm_head"])
    data = tiny.batch()
    found = mixed(model, data, NAMES)
    torch.testing.assert_close(found, one_by_one(model, data, NAMES), rtol=1e-5, atol=1e-5)
    ids = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    assert len(model.generate(**ids, num_beams=2, max_new_tokens=2, adapter_names=NAMES)) == 4


def test_models_that_join_rows_and_tokens_to_one_axis():
    def opt():
        torch.manual_seed(0)
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=tiny.N_WORDS,
                hidden_size=24,
                ffn_dim=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=24,
            )
        ).eval()

    model, data = two_adapters(opt()), tiny.batch()
    found = mixed(model, data, NAMES)
    torch.testing.assert_close(found, one_by_one(model, data, NAMES), rtol=1e-5, atol=1e-5)


def test_beams_of_an_encoder_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_ff": 40, "d_kv": 6, "num_heads": 4, "num_layers": 2}
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=tiny.N_WORDS, decoder_start_token_id=0, **sizes)
    )
    options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["wi", "wo"], "distance": "rms"}
    model = peft.get_peft_model(base, tiny.config(**options))
    model.add_adapter("second", tiny.config(seed=4, **options))
    for name in ("second", "default"):
        model.set_adapter(name)
        tiny.train(model, 4)
    enlarge(model.eval())
    data = {key: value for key, value in tiny.batch().items() if key != "labels"}
    found = model.generate(**data, num_beams=2, max_new_tokens=4, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        if name != BASE:
            model.set_adapter(name)
            alone = model.generate(**data, num_beams=2, max_new_tokens=4)
            n = min(alone.shape[1], found.shape[1])
            assert torch.equal(found[i, :n], alone[i, :n])


def test_routing_is_recorded_by_adapter_and_without_padding(model):
    data = tiny.batch(padding="left")  # row i has i tokens of padding
    with observe(model) as seen:
        mixed(model, data, NAMES)
    counts = {row["adapter"]: row["n_tokens"] for row in seen.rows()}
    assert counts == {"second": 9 + 6, "default": 7}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"] * 3, "3 names.*4 rows"),
        (["default", "second"], "2 names, and the batch 4 rows"),
        (["default", "other", BASE, BASE], "adapter_names has other; the adapters are __base__, "),
        ("default", "one name per row"),
        ([], "one name per row"),
    ],
    ids=str,
)
def test_bad_names_are_refused(model, names, message):
    with pytest.raises(InputError, match=message) as error:
        mixed(model, tiny.batch(), names)
    assert "\n" not in str(error.value)
    found = logits(model)  # no hook stays
    assert torch.equal(found, logits(model))


def test_generating_needs_a_name_per_row(model):
    data = tiny.batch()
    for given in ({"input_ids": data["input_ids"]}, {"inputs": data["input_ids"]}):
        with pytest.raises(InputError, match="2 names, and the batch 4 rows"):
            model.generate(**given, num_beams=2, max_new_tokens=2, adapter_names=NAMES[:2])


def test_training_is_refused(model):
    model.train()
    with pytest.raises(InputError, match="eval"):
        mixed(model, tiny.batch(), NAMES)
    model.eval()


def test_options_of_lora_are_refused(model):
    with pytest.raises(InputError, match="alora_offsets"):
        model(**tiny.batch(), alora_offsets=[1, 1, 1, 1])


def test_tokens_of_routed_experts_have_no_rows():
    with pytest.raises(InputError, match="routed tokens"):
        owners(torch.zeros(4, 3), ["a", "b"], "model.layers.0.mlp.experts.1.up_proj")
    assert owners(torch.zeros(4, 3), ["a", "b"], "model.layers.0.fc1").tolist() == [0, 0, 1, 1]


def test_a_weighted_sum_of_adapters_is_refused_with_what_to_do():
    model = two_adapters()
    with pytest.raises(MergeError, match=r"set_adapter\(\['default', 'second'\]\)"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert list(model.peft_config) == ["default", "second"]


def test_two_active_adapters_add_up():
    model, layer = two_adapters(), None
    x = torch.randn(2, 5, tiny.D_MODEL)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        base, parts = layer.base_layer(x), []
        for name in ("default", "second"):
            model.set_adapter(name)
            parts.append(layer(x) - base)
        model.base_model.set_adapter(["default", "second"])
        torch.testing.assert_close(layer(x), base + sum(parts), rtol=1e-4, atol=1e-5)
