"""Generation with a KV cache: one token gets what it gets among others, by other operations."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from budwood.tune import SlimLinear, observe
from budwood.tune.equations import route, route_one, standardise, yield_scores
from budwood.tune.slim import layer as layer_module
from tests import tiny_llm as tiny

KINDS = [
    {"distance": "discriminant"},
    {"distance": "whitened"},
    {"distance": "max", "yield_at": "module"},
    {"yielding": False},
    {"merging": False, "top_k": 3, "use_rslora": True},
    {"router": False},
    {"expert_bias": True},
    {"merge_inference": "mask"},
]
FAST = KINDS[:5]


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def trained(**options):
    model = tiny.slim(**options)
    for layer in layers(model):
        for one in layer.discriminants().values():
            one.set_direction(torch.randn(tiny.D_MODEL) / 5, torch.zeros(()), 1)
    tiny.train(model, 5, lr=1e-2)
    for layer in layers(model):  # what was learnt in five steps is little
        torch.nn.init.normal_(layer.weights("default")[1], std=0.5)
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    """Names of the ways that tokens went, one for each pass of a layer."""
    found = []
    for name in ("_with_experts", "_with_experts_on_one"):
        way = getattr(SlimLinear, name)

        def run(self, *args, way=way, name=name):
            result = way(self, *args)
            if result is not None:
                found.append(name)
            return result

        monkeypatch.setattr(SlimLinear, name, run)
    return found


def slowly(monkeypatch):
    monkeypatch.setattr(layer_module, "is_one_token", lambda x: False)


def decoded(model, seed: int = 0) -> torch.Tensor:
    """Logits of tokens that come one by one, shape (n_tokens, n_words)."""
    ids = tiny.batch(1, 12, seed, padding=None)["input_ids"]
    cache, logits = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0, 0])
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_token_alone_is_a_token_among_others(options, dtype, calls, monkeypatch):
    model = trained(model=tiny.llama(dtype), **options)
    calls.clear()
    found = decoded(model)
    assert set(calls) == {"_with_experts_on_one" if options in FAST else "_with_experts"}
    slowly(monkeypatch)
    expected = decoded(model)
    with model.disable_adapter():
        effect = (found - decoded(model)).abs().max()
    assert effect > 0.05
    precision = 1e-5 if dtype == torch.float32 else 0.02
    assert (found - expected).abs().max() < precision * max(1, effect)


def test_a_token_that_bypasses_gets_the_base_models_output(calls):
    model = trained()
    calls.clear()
    for layer in layers(model):
        for statistics in layer.slim_clusters.values():
            statistics.distance_mean.sub_(1e6)
    assert torch.equal(decoded(model), decoded(tiny.llama()))
    assert set(calls) == {"_with_experts_on_one"}


@pytest.mark.parametrize("distance", ["discriminant", "whitened"])
def test_what_changes_between_two_tokens_counts(distance, monkeypatch):
    model = trained(distance=distance)
    layer = layers(model)[0]
    (a, b), statistics = layer.weights("default"), layer.slim_clusters["default"]

    start = {key: value.clone() for key, value in statistics.state_dict().items()}

    def changes():
        yield
        with torch.no_grad():
            yield a.mul_(1.1)
            yield b.data.add_(0.1)  # counted by no version
            yield statistics.distance_mean.sub_(1e6)
            yield statistics.load_state_dict(start)
            yield statistics.distance_mean.copy_(torch.tensor(-1e6))
        layer.slim_config["default"].beta = 0.0
        yield
        yield tiny.train(model, 2, lr=3e-2), model.eval()
        yield model.add_adapter("other", tiny.config()), model.set_adapter("other")
        yield model.set_adapter("default")
        yield model.to(torch.bfloat16)

    seen = [decoded(model).float() for _ in changes()]
    same = [i for i, pair in enumerate(itertools.pairwise(seen)) if torch.equal(*pair)]
    assert not same
    model.to(torch.float32)
    found = decoded(model)
    slowly(monkeypatch)
    torch.testing.assert_close(found, decoded(model), rtol=1e-4, atol=1e-4)


def test_what_a_hook_was_shown_stays():
    model, shown = trained(yielding=False), []
    layer = layers(model)[0]
    x = torch.randn(1, 1, tiny.D_MODEL)
    with torch.no_grad():
        expected = layer(x)
        layer.base_layer.register_forward_hook(lambda module, args, out: shown.append(out))
        found = layer(x)
        assert torch.equal(found, expected)
        assert torch.equal(shown[0], layer.base_layer(x)) and not torch.equal(found, shown[0])


def test_passes_that_take_the_other_way(calls):
    model = trained()
    calls.clear()
    ids = tiny.batch(1, 1, padding=None)["input_ids"]
    model(input_ids=ids).logits.sum().backward()
    with torch.no_grad():
        with observe(model):
            model(input_ids=ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids)
        model.train()
        model(input_ids=ids)
        model.eval()(input_ids=ids.expand(2, 1))
    assert set(calls) == {"_with_experts"}


def test_generation_ends_as_without_a_cache():
    model = trained()
    ids = tiny.batch(1, 6, padding=None)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = [model.generate(input_ids=ids, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)


def test_a_block_of_which_one_layer_takes_the_other_way(monkeypatch):
    """The last module yields by the distance of the first, whichever way that one was measured."""
    model = trained()
    expected = decoded(model)
    other = copy.deepcopy(model)
    for name in ("gate_proj", "down_proj"):
        with monkeypatch.context() as patch:
            way = SlimLinear._with_experts_on_one
            patch.setattr(
                SlimLinear,
                "_with_experts_on_one",
                lambda self, *args, way=way, name=name: (
                    None if self.slim_key.endswith(name) else way(self, *args)
                ),
            )
            torch.testing.assert_close(decoded(other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3, 10])
def test_routing_with_plain_numbers(top_k):
    torch.manual_seed(0)
    for _ in range(30):
        logits, d = torch.randn(1, 10) * 3, torch.randn(1) / 2
        expected = route(yield_scores(standardise(logits), d, 8, 4.0), top_k)[0, :8]
        found = torch.zeros(8)
        for expert, weight in route_one(logits[0].tolist(), d.item(), 8, top_k, 4.0).items():
            found[expert] = weight
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", [float("inf"), float("nan"), -float("inf")])
def test_routing_of_what_is_not_finite(distance):
    logits = [1.0, 2.0, 3.0, 5.0]
    found = route_one(logits, distance, 2, 2, 4.0)
    if distance == float("inf"):
        assert not found
    else:
        assert found and all(math.isnan(weight) for weight in found.values())
