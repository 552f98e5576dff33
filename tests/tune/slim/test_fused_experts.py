"""Mixture-of-experts bases: the routed experts are adapted, or the model is refused by name."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from budwood.errors import InputError, MergeError, UnsupportedModelError
from budwood.tune import SlimLinear, export_lora, fit_discriminant, observe
from budwood.tune.slim.fused_experts import SlimExperts, is_fused, why_not
from tests import tiny_chat, tiny_moe
from tests import tiny_llm as tiny
from tests.reference import slim_moe_reference as reference
from tests.tiny_llm import logits

KINDS = sorted(tiny_moe.SIZES)
BLOCKS = {"qwen2_moe": 1, "deepseek_v3": 2, "nemotron_h": 2}
"""Number of blocks with routed experts, where it is not that of the layers."""


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def outer(model):
    return [one for one in layers(model) if isinstance(one, SlimExperts) and len(one.layers()) == 2]


def slim(kind, **changes):
    return tiny.slim(tiny_moe.model(kind), **{"distance": "rms", **changes})


def trained(kind, steps=5, **changes):
    model = slim(kind, **changes)
    tiny.train(model, steps, lr=2e-2)
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def of_kind(request):
    return request.param, trained(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_default_targets_have_every_routed_expert(kind):
    model = slim(kind)
    blocks = outer(model)
    assert len(blocks) == BLOCKS.get(kind, 3)
    for block in blocks:
        n_parts = block.fused.num_experts
        for layer in block.layers():
            assert all(len(weight) == n_parts for weight in layer.weights("default"))
    linear = {one.slim_key for one in layers(model)} - {
        x.slim_key for b in blocks for x in b.layers()
    }
    inside = [name for name, module in model.named_modules() if is_fused(module)]
    assert inside and not any("expert" in name and "shared" not in name for name in linear)
    plain = {"qwen2_moe": 9, "deepseek_v3": 9, "nemotron_h": 4}
    assert len(linear) == plain.get(kind, 0)  # dense MLPs and shared experts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_at_initialisation_is_the_base_models(kind, dtype, training):
    base = tiny_moe.model(kind, dtype)
    expected = logits(base)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = tiny.slim(base).train(training)
    assert torch.equal(logits(model), expected)
    inner = model.unload()
    assert all(torch.equal(v, before[k]) for k, v in inner.state_dict().items())
    assert torch.equal(logits(inner.eval()), expected)


def test_a_block_is_what_the_equations_say(of_kind):
    _, model = of_kind
    block = outer(model)[-1]
    config, experts = block.slim_config["default"], block.fused
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    index = torch.rand(7, experts.num_experts).topk(2).indices
    shares = torch.rand(7, 2)
    first, last = ([w.detach().double() for w in one.weights("default")] for one in block.layers())
    statistics = block.layers()[0].statistics("default")
    assert block.statistics("default") is statistics and statistics.steps >= 2
    with torch.no_grad():
        distances, _ = statistics.measured(x, None, gather=False, training=False)
        found = block(x, index, shares)
        scale = config.scale * (1 - config.merge_p)
        expected = reference.block(
            x.double(),
            index,
            shares.double(),
            experts,
            first,
            last,
            distances.tolist(),
            config,
            scale,
        )
        plain = experts(x, index, shares)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_the_equations(kind):
    model = slim(kind, merging=False, l1=0.0, yielding=False)
    for layer in layers(model):
        nn.init.normal_(layer.weights("default")[1], std=0.1)
    block = outer(model)[0].train()
    x = torch.randn(6, 24)
    index, shares = torch.rand(6, block.fused.num_experts).topk(2).indices, torch.rand(6, 2)
    block(x, index, shares).square().sum().backward()
    found = [weight.grad.double() for one in block.layers() for weight in one.weights("default")]
    weights = [
        weight.detach().double().requires_grad_()
        for one in block.layers()
        for weight in one.weights("default")
    ]
    config = block.slim_config["default"]
    out = _differentiable(x.double(), index, shares.double(), block.fused, weights, config)
    out.square().sum().backward()
    for one, weight in zip(found, weights):
        torch.testing.assert_close(one, weight.grad, rtol=1e-3, atol=1e-5)
        assert weight.grad.abs().max() > 0


def _differentiable(x, index, shares, experts, weights, config):
    """The block with autograd's own operations, one part at a time."""

    def project(name, h, part, a, b):
        weight = getattr(experts, name)[part].double()
        out = h @ (weight if experts.is_transposed else weight.T)
        if experts.has_bias:
            out = out + getattr(experts, f"{name}_bias")[part].double()
        hidden, scores = (h @ a.T).split([config.rank, config.n_total], -1)
        centred = scores - scores.mean(-1, keepdim=True)
        scores = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        kept = scores.topk(config.top_k, -1)
        routing = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))
        lora = routing[:, : config.n_experts].repeat_interleave(config.r, -1)
        return out + (hidden * lora * config.scale) @ b.T

    result = torch.zeros_like(x)
    for part in range(experts.num_experts):
        token, slot = torch.where(index == part)
        up_a, up_b, down_a, down_b = (weight[part] for weight in weights)
        h = experts._apply_gate(project("gate_up_proj", x[token], part, up_a, up_b))
        y = project("down_proj", h, part, down_a, down_b)
        result = result.index_add(0, token, y * shares[token, slot, None])
    return result


def test_a_batch_that_bypasses_is_the_base_models(of_kind):
    kind, model = of_kind
    before = {}
    for layer in layers(model):
        for statistics in layer.slim_clusters.values():
            before[statistics] = statistics.centre.clone(), statistics.distance_var.clone()
            statistics.centre.add_(1e3)
            statistics.distance_var.fill_(1e-6)
    with observe(model) as seen:
        found = logits(model)
    assert seen.mean("bypassed_share") == 1
    assert torch.equal(found, logits(tiny_moe.model(kind)))
    for statistics, (centre, var) in before.items():
        statistics.centre.copy_(centre)
        statistics.distance_var.copy_(var)


def test_a_token_that_bypasses_among_others(of_kind):
    _, model = of_kind
    block = outer(model)[-1]
    x = torch.randn(12, 24, generator=torch.Generator().manual_seed(2))
    x[:5] *= 1e4
    index, shares = torch.rand(12, block.fused.num_experts).topk(2).indices, torch.rand(12, 2)
    with torch.no_grad():
        found, plain = block(x, index, shares), block.fused(x, index, shares)
    assert torch.equal(found[:5], plain[:5])
    assert not torch.equal(found[5:], plain[5:])


def test_training_lowers_the_loss_and_leaves_the_base_alone(of_kind):
    kind, _ = of_kind
    base = tiny_moe.model(kind)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = tiny.slim(base, distance="rms")
    losses = tiny.train(model, 10, lr=2e-2, same=True)
    assert losses[-1] < losses[0]
    for block in outer(model):
        assert all(one.weights("default")[1].abs().max() > 0 for one in block.layers())
        assert int(block.layers()[0].slim_clusters["default"].n_steps) == 10
    plain = model.unload().state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in before.items())


def test_saved_and_loaded_adapters_are_bit_equal(of_kind, tmp_path):
    kind, model = of_kind
    expected, states = logits(model), tiny.states(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_moe.model(kind), tmp_path).eval()
    found = tiny.states(loaded)
    assert found.keys() == states.keys() and all(
        torch.equal(v, states[k]) for k, v in found.items()
    )
    assert torch.equal(logits(loaded), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_moe.model(kind)))
    lean = peft.PeftModel.from_pretrained(tiny_moe.model(kind), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean.eval()), expected)


def test_transformers_loads_it_by_itself(of_kind, tmp_path):
    """Its table of renamed weights of experts leaves an adapter's alone."""
    kind, model = of_kind
    model.save_pretrained(tmp_path)
    base = tiny_moe.model(kind)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base.eval()), logits(model))


def test_checkpointing_counts_once(of_kind):
    kind, _ = of_kind
    sums = []
    for checkpointing in (False, True):
        model = trained(kind, steps=2)
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        tiny.train(model, 2, start=7)
        sums.append(tiny.states(model))
    assert all(torch.allclose(value, sums[1][key], atol=1e-6) for key, value in sums[0].items())


def test_the_discriminant_is_fitted_on_the_input_of_a_block():
    model = slim("qwen2_moe", distance="discriminant")
    rows = [{"input_ids": list(range(3, 40)), "labels": list(range(3, 40))}]
    texts = [{"input_ids": list(range(58, 10, -1)), "labels": list(range(58, 10, -1))}]
    fit_discriminant(model, tiny_chat.tokenizer(), rows, texts)
    first, last = outer(model)[0].layers()
    assert first.slim_clusters["default"].is_fitted and not last.slim_clusters
    losses = tiny.train(model, 4, same=True)
    assert all(loss == loss for loss in losses)


def test_rows_with_adapters_of_their_own(of_kind):
    kind, _ = of_kind
    model = trained(kind)
    model.add_adapter("second", tiny.config(r=2, seed=4, distance="rms"))
    model.set_adapter("second")
    tiny.train(model, 4, start=9)
    model.eval()
    data = tiny.batch(padding=None)
    whole = {"__base__": logits(tiny_moe.model(kind), data), "second": logits(model, data)}
    model.set_adapter("default")
    whole["default"] = logits(model, data)
    names = ["second", "__base__", "default", "second"]
    with torch.no_grad():
        found = model(input_ids=data["input_ids"], adapter_names=names).logits
    expected = torch.stack([whole[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_implementations_of_the_base_model_agree(of_kind):
    _, model = of_kind
    expected = logits(model)
    for implementation in ("eager", "batched_mm"):
        model.get_base_model().set_experts_implementation(implementation)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.get_base_model().set_experts_implementation("grouped_mm")


def test_routing_is_recorded_for_both_weights(of_kind):
    _, model = of_kind
    with observe(model) as seen:
        logits(model)
    keys = {layer.slim_key for block in outer(model) for layer in block.layers()}
    rows = {row["layer"]: row for row in seen.rows()}
    assert keys <= rows.keys() and all(rows[key]["n_tokens"] > 0 for key in keys)


def test_weights_that_are_named_one_by_one(tmp_path):
    model = slim("qwen3_moe", target_parameters=["mlp.experts.down_proj"])
    tiny.train(model, 4)
    assert len(layers(model)) == 6 and all("default" in b.slim_in for b in outer(model))
    assert not any("default" in b.layers()[0].slim_in for b in outer(model))
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_moe.model("qwen3_moe"), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    named = slim("qwen3_moe", target_parameters=both, target_modules=["q_proj"])
    assert len(outer(named)) == 3 and len(layers(named)) == 9
    with pytest.raises(InputError, match="match no fused weight; this model has experts.gate_up"):
        slim("qwen3_moe", target_parameters=["mlp.expert.down"])
    with pytest.raises(UnsupportedModelError, match="target_modules for linear layers"):
        slim("qwen3_moe", target_parameters=["q_proj.weight"])
    with pytest.raises(InputError, match="layers_to_transform.*target_parameters"):
        tiny.config(target_parameters=both, layers_to_transform=[1])


@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_alone_are_not_taken_without_a_word(kind, names):
    with pytest.warns(UserWarning, match="not the routed experts.*add 'experts'"):
        slim(kind, target_modules=names)


def test_shared_experts_that_are_named_are_meant():
    assert len(layers(slim("qwen2_moe", target_modules=["shared_expert.up_proj"]))) == 1


def test_target_modules_may_name_the_experts():
    model = slim("qwen2_moe", target_modules=["experts", "down_proj"])
    assert len(outer(model)) == 1


def test_attention_alone_is_a_choice_of_its_own():
    assert len(layers(slim("qwen2_moe", target_modules=["q_proj"]))) == 3


def test_nothing_matches_and_experts_are_named():
    with pytest.raises(InputError, match="fused experts: experts"):
        slim("qwen3_moe", target_modules=["gate_proj"])


def test_later_layers_are_adapted_by_default():
    model = slim("qwen3_moe", skip_first=0.4)
    assert [one.slim_key.split(".")[2] for one in outer(model)] == ["1", "2"]
    model = slim("qwen3_moe", layers_to_transform=[0])
    assert [one.slim_key.split(".")[2] for one in outer(model)] == ["0"]


class OddExperts(nn.Module):
    """Fused experts in a form that transformers cannot exchange."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj


def test_experts_of_another_form_are_refused_by_name():
    base = tiny_moe.model("mixtral")
    base.model.layers[1].mlp.experts = OddExperts(base.model.layers[1].mlp.experts)
    with pytest.raises(
        UnsupportedModelError, match="layers.1.mlp.experts.*OddExperts.*attention"
    ) as e:
        tiny.slim(base)
    assert "\n" not in str(e.value)
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert len(layers(tiny.slim(base, target_modules=["q_proj"]))) == 3


def test_quantised_and_spread_experts_are_refused():
    experts = tiny_moe.model("mixtral").model.layers[0].mlp.experts
    assert why_not(experts) is None
    experts._is_expert_parallel = True
    assert "spread over devices" in why_not(experts)
    experts._is_expert_parallel = False
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.uint8), requires_grad=False)
    assert "quantised" in why_not(experts)


def test_merging_and_export_are_refused(of_kind, tmp_path):
    _, model = of_kind
    with pytest.raises(MergeError):
        model.merge_and_unload()
    with pytest.raises(InputError, match="fused experts"):
        export_lora(model, [tiny.batch()], tmp_path / "lora")
