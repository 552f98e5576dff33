"""``torch.compile`` has no graph breaks inside SLIM's layers, and the numbers are the same."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch._dynamo

from budwood.tune import SlimLinear
from budwood.tune.slim import layer as layer_module
from tests import tiny_llm as tiny
from tests import tiny_moe
from tests.tiny_llm import logits, states


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def all_rows(monkeypatch):
    """Eager passes leave no row out, as a graph does; so their sums are in one order."""
    monkeypatch.setattr(layer_module, "skips_bypassed", lambda x: False)


def small():
    """A base model of two layers, since each of them is compiled."""
    return tiny.llama(num_hidden_layers=2)


def ready(steps=3, base=None, **changes):
    """An adapter whose statistics are there, with its optimiser."""
    model = tiny.slim(small() if base is None else base, **changes)
    optim = tiny.optimiser(model)
    tiny.train(model, steps, optim=optim)
    return model, optim


def breaks(model, data) -> list[str]:
    """Reasons of the graph breaks of one pass, and of the backward pass where it has a loss."""
    found = torch._dynamo.explain(model)(**data)
    return [str(one.reason) for one in found.break_reasons]


DISTANCES = ["whitened", "rms", "discriminant"]


def fitted(model):
    for layer in (one for one in model.modules() if isinstance(one, SlimLinear)):
        for statistics in layer.discriminants().values():
            generator = torch.Generator().manual_seed(1)
            direction = torch.randn(statistics.d_in, generator=generator)
            statistics.set_direction(direction, torch.zeros(()), 1)
    return model


@pytest.mark.parametrize("distance", DISTANCES)
def test_training_and_inference_have_no_graph_breaks(distance):
    model = fitted(tiny.slim(small(), distance=distance))
    tiny.train(model, 3)
    data = tiny.batch()
    assert breaks(model, data) == []
    model.eval()
    with torch.no_grad():
        assert breaks(model, data) == []


def test_lora_has_no_graph_breaks_either():
    """The measure is a fair one."""
    model = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["up_proj"]))
    assert breaks(model, tiny.batch()) == []


@pytest.mark.parametrize(
    "options", [{}, {"merging": False}, {"dropout": 0.3}, {"l1": 0.3}], ids=str
)
def test_a_compiled_step_is_the_plain_one(options, all_rows):
    runs = []
    for compiled in (False, True):
        model, optim = ready(**options)
        model.train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses = []
        for step in range(4):
            torch.manual_seed(step)
            optim.zero_grad()
            loss = run(**tiny.batch(seed=30 + step)).loss
            loss.backward()
            optim.step()
            losses.append(loss.detach())
        runs.append((torch.stack(losses), states(model)))
    (losses, plain), (compiled_losses, compiled) = runs
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-4, atol=1e-5)
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=2e-3, atol=2e-4, msg=key)


def test_the_first_steps_too(all_rows):
    """Statistics start inside a graph: there are no distances in the first two steps."""
    found = []
    for compiled in (False, True):
        model = tiny.slim(small())
        optim = tiny.optimiser(model)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        model.train()
        for step in range(3):
            optim.zero_grad()
            run(**tiny.batch(seed=step)).loss.backward()
            optim.step()
        found.append(states(model))
    steps = [value for key, value in found[1].items() if key.endswith("clusters.n_steps")]
    assert steps and all(int(value) == 3 for value in steps)
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=2e-3, atol=2e-4, msg=key)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_gradient_checkpointing(all_rows):
    """Transformers' own hook on the embeddings breaks the graph here, with any adapter."""
    grads = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model, _ = ready()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(**tiny.batch(seed=1), use_cache=False).loss.backward()
        weights = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.cat([weight.grad.flatten() for weight in weights]))
        layer = next(one for one in model.modules() if isinstance(one, SlimLinear))
        statistics = layer.slim_clusters["default"]
        assert int(statistics.gathered().distance[0]) == 4 * 8 - 6  # each supervised token once
    assert not any("budwood" in one for one in torch._dynamo.utils.counters["graph_break"])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


def test_accumulated_passes_count_and_are_penalised_once(all_rows):
    grads = []
    for compiled in (False, True):
        model, _ = ready(l1=0.5)
        model.train().zero_grad()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in (1, 2):
            run(**tiny.batch(seed=seed)).loss.backward()
        weights = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.cat([weight.grad.flatten() for weight in weights]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_logits_are_the_plain_ones(mode, all_rows):
    model, _ = ready()
    model.eval()
    inputs = {key: value for key, value in tiny.batch().items() if key != "labels"}
    expected = logits(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mode():
        torch.testing.assert_close(run(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        other = tiny.batch(seed=5)
        again = run(input_ids=other["input_ids"], attention_mask=other["attention_mask"]).logits
    torch.testing.assert_close(again, logits(model, other), rtol=1e-5, atol=1e-5)


def test_generation_with_a_compiled_model(all_rows):
    model, _ = ready()
    model.eval()
    data = {key: value for key, value in tiny.batch(padding="left").items() if key != "labels"}
    expected = model.generate(**data, max_new_tokens=5)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    found = model.generate(**data, max_new_tokens=5)
    assert torch.equal(found, expected)
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert not any("budwood" in reason for reason in reasons), reasons


def test_layers_of_one_shape_share_a_graph(all_rows):
    """A layer compiled by itself is not compiled again for each of its like."""
    model, _ = ready(base=tiny.llama(num_hidden_layers=6))
    model.eval()
    expected = logits(model)
    for block in model.get_base_model().model.layers:  # whose attention knows its number
        block.mlp.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_fused_experts(kind, all_rows):
    model = tiny.slim(tiny_moe.model(kind), distance="rms")
    tiny.train(model, 3)
    data = tiny.batch()
    inside = [reason for reason in breaks(model, data) if "budwood" in reason]
    assert inside == []
    model.eval()
    expected = logits(model)
    run = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        found = run(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_copies_have_handles_of_their_own():
    model, _ = ready()
    copied = copy.deepcopy(model)
    numbers = [
        int(one.handle)
        for each in (model, copied)
        for layer in each.modules()
        if isinstance(layer, SlimLinear)
        for one in (layer, *layer.slim_clusters.values())
    ]
    assert len(numbers) == len(set(numbers))
