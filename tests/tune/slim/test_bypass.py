"""A token with no weight on LoRA experts gets the base model's output, bit for bit."""

from __future__ import annotations

import pytest
import torch

from budwood.tune import SlimLinear, observe
from budwood.tune.equations import l1_slopes
from budwood.tune.slim import layer as layer_module
from budwood.tune.slim.observe import identity_by_token
from tests import tiny_llm as tiny
from tests.tiny_llm import logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def send_away(model, factor=1e-6):
    """Let every token look far from the training data."""
    for layer in layers(model):
        for statistics in layer.slim_clusters.values():
            statistics.centre.add_(1e3)
            statistics.distance_var.fill_(factor)
    return model


@pytest.fixture(scope="module")
def away():
    return send_away(tiny.trained())


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_batch_that_bypasses_is_the_base_models(away, padding):
    data = tiny.batch(padding=padding)
    with observe(away) as seen:
        found = logits(away, data)
    assert seen.mean("bypassed_share") == 1 and seen.mean("identity_share") == 1
    assert torch.equal(found, logits(tiny.llama(), data))


def test_identity_by_token(away):
    tokens = tiny.batch(padding=None)["input_ids"][0]
    model = tiny.slim().eval()
    with observe(model) as seen:
        model(input_ids=tokens[None])
    shares = identity_by_token(model, tokens)
    assert shares.shape == tokens.shape and shares.std() > 0
    assert shares.mean().item() == pytest.approx(seen.mean("identity_share"))
    assert torch.equal(identity_by_token(away, tokens), torch.ones(len(tokens)).double())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generation_that_bypasses_is_the_base_models(away, options):
    data = tiny.batch(padding="left")
    del data["labels"]
    found = []
    for model in (away, tiny.llama()):
        torch.manual_seed(5)
        found.append(model.generate(**data, max_new_tokens=6, **options))
    assert torch.equal(*found)


def test_cached_steps_that_bypass_are_the_base_models(away):
    data = tiny.batch(padding=None)
    found = []
    for model in (away, tiny.llama()):
        with torch.no_grad():
            first = model(input_ids=data["input_ids"][:, :6], use_cache=True)
            second = model(
                input_ids=data["input_ids"][:, 6:], past_key_values=first.past_key_values
            )
        found.append(torch.cat([first.logits, second.logits], 1))
    assert torch.equal(*found)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bypassed_tokens_among_others(skip, share, dtype, monkeypatch):
    monkeypatch.setattr(layer_module, "skips_bypassed", lambda x: skip)
    model = tiny.trained(model=tiny.llama(dtype))
    layer = layers(model)[0]
    x = torch.randn(40, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x * layer.slim_clusters["default"].scale.reciprocal().mean().to(dtype)
    far = torch.arange(40) < 40 * share
    x[far] *= 1e3
    with observe(model) as seen:
        found, base = layer(x), layer.base_layer(x)
    assert seen.rows()[0]["bypassed_share"] >= share
    assert torch.equal(found[far], base[far])
    assert not torch.equal(found[~far], base[~far])


def test_leaving_tokens_out_changes_nothing_for_the_others(monkeypatch):
    # The penalty counts once a step, and these are two passes, of a layer alone.
    model = tiny.trained(l1=0.0, fit_on="all")
    layer = layers(model)[0]
    x = torch.randn(40, tiny.D_MODEL) * layer.slim_clusters["default"].scale.reciprocal().mean()
    x[:30] *= 1e3
    outs, grads = [], []
    for skip in (True, False):
        monkeypatch.setattr(layer_module, "skips_bypassed", lambda x, skip=skip: skip)
        monkeypatch.setattr(layer_module, "SKIP_FROM", 0.01)
        layer.train()
        model.zero_grad()
        outs.append(layer(x))
        outs[-1].square().sum().backward()
        grads.append(
            [
                layer.slim_in["default"].weight.grad.clone(),
                layer.slim_out["default"].weight.grad.clone(),
            ]
        )
    assert torch.allclose(*outs, atol=1e-5, rtol=1e-5)
    for one, other in zip(*grads):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


def test_training_on_a_batch_that_bypasses_gives_zero_gradients_to_all():
    model = send_away(tiny.trained(l1=0.0))
    model.train()
    model.zero_grad()
    model(**tiny.batch()).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and (p.grad == 0).all() for p in trained)


def test_training_on_a_batch_that_bypasses_is_counted_and_penalised_once():
    model = send_away(tiny.trained(l1=0.5))
    model.train()
    base, data = logits(tiny.llama(), tiny.batch()), tiny.batch()
    model.zero_grad()
    for _ in range(2):  # of one optimiser step
        out = model(**data)
        assert torch.equal(out.logits, base)
        out.loss.backward()
    for layer in layers(model):
        config, slim_in = layer.slim_config["default"], layer.slim_in["default"].weight
        slope, _ = l1_slopes(0.5, config.r, layer.in_features, layer.out_features)
        expected = slope * slim_in.sign()
        expected[config.rank :] = 0  # the router
        assert torch.allclose(slim_in.grad, expected)
    statistics = layers(model)[0].slim_clusters["default"]
    before = statistics.distance_mean.clone()
    layers(model)[0].keeper.commit()
    assert statistics.distance_mean > before  # all of these tokens are far away


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_on_a_batch_that_bypasses(reentrant):
    model = send_away(tiny.trained(l1=0.5))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model.zero_grad()
        model(**tiny.batch()).loss.backward()
        layers(model)[0].keeper.forget_gathered()
        grads.append([layer.slim_in["default"].weight.grad.clone() for layer in layers(model)])
    assert all(one.abs().sum() > 0 and torch.equal(one, two) for one, two in zip(*grads))


@pytest.mark.parametrize("inference", ["mask", "expectation"])
def test_backward_in_evaluation_has_zero_gradients(inference):
    model = send_away(tiny.trained(merge_inference=inference, l1=0.5)).eval()
    model.zero_grad()
    model(**tiny.batch()).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_the_past_of_a_token_decides_nothing_about_its_routing():
    """Causal: logits of a prefix are those with more text after it."""
    model = tiny.trained()
    data = tiny.batch(padding=None)
    whole = logits(model, data)
    part = logits(model, {key: value[:, :5] for key, value in data.items()})
    assert torch.allclose(whole[:, :5], part, atol=1e-5)
