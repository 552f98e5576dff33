"""Which optimiser steps commit what: several adapters, several optimisers, passes in between."""

from __future__ import annotations

import pytest
import torch

from budwood.errors import DivergedError
from budwood.tune import SlimLinear, commit
from budwood.tune.slim.keeper import keeper_of
from tests import tiny_llm as tiny


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def counted(model, adapter="default"):
    """Steps that the statistics and the masks of an adapter have made, over all layers."""
    kept = {"slim_clusters": set(), "slim_mask": set()}
    for layer in layers(model):
        for name, steps in kept.items():
            if adapter in getattr(layer, name):
                steps.add(int(getattr(layer, name)[adapter].n_steps))
    return kept["slim_clusters"], kept["slim_mask"]


def two_adapters():
    model = tiny.slim()
    model.add_adapter("second", tiny.config())
    for layer in layers(model):
        layer.slim_in.requires_grad_(True)
        layer.slim_out.requires_grad_(True)
    return model.train()


def weights_of(model, adapter):
    return [weight for one in layers(model) for weight in one.weights(adapter)]


def backward(model, adapter, seed=0):
    model.set_adapter(adapter)
    model(**tiny.batch(seed=seed)).loss.backward()


def test_one_step_for_several_adapters_that_took_turns():
    model = two_adapters()
    optim = torch.optim.SGD(weights_of(model, "default") + weights_of(model, "second"), lr=0.1)
    backward(model, "default")
    backward(model, "second")
    optim.step()
    assert counted(model) == counted(model, "second") == ({1}, {1})
    assert not keeper_of(model).pending


def test_an_adapters_own_optimiser_commits_it_and_no_other():
    model = two_adapters()
    optims = {one: torch.optim.SGD(weights_of(model, one), lr=0.1) for one in ("default", "second")}
    backward(model, "default")
    backward(model, "second")
    optims["default"].step()  # "second" is the active one
    assert counted(model) == ({1}, {1}) and counted(model, "second") == ({0}, {0})
    optims["second"].step()
    assert counted(model) == counted(model, "second") == ({1}, {1})
    backward(model, "default")
    assert commit(model)
    assert counted(model) == ({2}, {2}) and counted(model, "second") == ({1}, {1})


def test_optimisers_that_step_in_backward_count_each_layer_once():
    model, plain = tiny.slim(l1=0.5).train(), tiny.slim(l1=0.5).train()
    for weight in [one for one in model.parameters() if one.requires_grad]:
        optim = torch.optim.SGD([weight], lr=0.1)
        weight.register_post_accumulate_grad_hook(lambda _, optim=optim: optim.step())
    for seed in range(3):
        model.zero_grad()
        model(**tiny.batch(seed=seed)).loss.backward()
    tiny.train(plain, 3, optim=torch.optim.SGD(plain.parameters(), lr=0.1))
    assert counted(model) == counted(plain) == ({3}, {3})
    expected = tiny.states(plain)
    for key, value in tiny.states(model).items():
        torch.testing.assert_close(value, expected[key], msg=key)


def test_a_commit_between_forward_and_backward_leaves_the_masks_of_the_pass():
    grads = []
    for between in (False, True):
        model = tiny.slim(l1=0.0, yielding=False)
        tiny.train(model, 2)
        model.zero_grad()
        loss = model(**tiny.batch(seed=9)).loss
        if between:
            for layer in layers(model):
                layer.slim_mask["default"].commit()
        loss.backward()
        grads.append([one.grad for one in weights_of(model, "default")])
    assert all(torch.equal(one, other) for one, other in zip(*grads))


@pytest.mark.parametrize("inference", ["mask", "expectation"])
def test_gradients_in_evaluation_are_none_of_training(inference):
    model, data = tiny.trained(l1=0.7, merge_inference=inference), tiny.batch()
    penalised = layers(model)[0].slim_in["default"].weight
    model.zero_grad()
    model.eval()(**data).loss.backward()
    assert not keeper_of(model).pending
    first = penalised.grad.clone()
    for layer in layers(model):
        layer.slim_config["default"].l1 = 0.0
    model.zero_grad()
    model(**data).loss.backward()
    assert torch.equal(penalised.grad, first)  # without the penalty


def test_a_frozen_adapter_beside_a_trained_one_is_as_in_inference():
    model = tiny.trained()
    expected = tiny.logits(model)
    model.add_adapter("second", tiny.config())
    model.base_model.set_adapter(["default", "second"])
    for one in weights_of(model, "default"):
        one.requires_grad_(False)
    assert torch.equal(tiny.logits(model.train()), expected)  # the second adds nothing yet
    before = counted(model)
    model(**tiny.batch()).loss.backward()
    commit(model)
    assert counted(model) == before and counted(model, "second") == ({1}, {1})


@pytest.mark.parametrize("distance", ["whitened", "rms", "max"])
@pytest.mark.parametrize("n_supervised", [1, 2])
def test_a_token_or_two_a_step_are_enough(distance, n_supervised):
    model = tiny.slim(distance=distance).train()
    optim = tiny.optimiser(model)
    try:
        for seed in range(25):
            data = tiny.batch(1, seed=seed, padding=None)
            data["labels"][:, :-n_supervised] = -100
            optim.zero_grad()
            model(**data).loss.backward()
            optim.step()
    except DivergedError:
        pytest.fail("a few tokens are no divergence")
    assert counted(model) == ({25}, {25})
    for statistics in [one for layer in layers(model) for one in layer.slim_clusters.values()]:
        assert all(bool(value.isfinite().all()) for value in statistics.buffers())
        assert statistics.distance_mean.abs() < 100
    assert tiny.logits(model.eval()).isfinite().all()
