"""Threads that pass through one model at the same time do not read each other's values."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch

from budwood.tune import SlimLinear, observe
from budwood.tune.slim.adapter_names import BASE
from budwood.tune.slim.compiled import distance_in_graph, last_in_graph
from budwood.tune.slim.latest import Latest
from budwood.tune.slim.observe import identity_by_token
from budwood.tune.slim.state import InputStatistics
from tests import tiny_llm as tiny
from tests import tiny_moe
from tests.tiny_llm import logits

SECONDS = 60


def layers(model):
    return [one for one in model.modules() if isinstance(one, SlimLinear)]


def ready(base=None, **options):
    """A model whose adapter does much, and depends on every distance."""
    model = tiny.slim(base, margin=0.0, beta=0.5, **options)
    tiny.train(model, 6)
    torch.manual_seed(2)
    for layer in layers(model):
        torch.nn.init.normal_(layer.weights("default")[1], std=0.3)
    return model.eval()


def together(*tasks):
    """Run functions at the same time; return what they return."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [one.result(SECONDS) for one in [pool.submit(task) for task in tasks]]


def wait_before(monkeypatch, *names):
    """Two threads wait for each other before each call of methods of the statistics."""
    barrier = Barrier(2)
    for name in names:
        method = getattr(InputStatistics, name)

        def waiting(self, *args, method=method):
            barrier.wait(SECONDS)
            return method(self, *args)

        monkeypatch.setattr(InputStatistics, name, waiting)


def check_two_threads(model, length, monkeypatch, mode=torch.no_grad):
    """Compare passes of two threads with those of one; their later layers run at the same time."""
    prompts = [tiny.batch(1, length, seed, padding=None) for seed in (3, 4)]
    expected = [logits(model, prompt) for prompt in prompts]

    def run(prompt):
        with mode():
            return model(input_ids=prompt["input_ids"]).logits

    wait_before(monkeypatch, "last_distance", "last_of_one")
    found = together(*(lambda prompt=prompt: run(prompt) for prompt in prompts))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("length", [1, 12])
def test_logits_of_two_threads_are_those_of_one(length, mode, monkeypatch):
    check_two_threads(ready(), length, monkeypatch, mode)


@pytest.mark.parametrize("length", [1, 12])
def test_fused_experts(length, monkeypatch):
    check_two_threads(ready(tiny_moe.model("qwen3_moe"), distance="rms"), length, monkeypatch)


def test_inside_graphs():
    statistics, barrier = layers(ready())[0].slim_clusters["default"], Barrier(2)
    inputs = [torch.randn(1, 5, tiny.D_MODEL), torch.randn(1, 5, tiny.D_MODEL) * 3]

    def first_and_last(x):
        first, _ = distance_in_graph(statistics, x, None, gather=False, training=False)
        barrier.wait(SECONDS)
        return first, last_in_graph(statistics, x)

    for first, last in together(*(lambda x=x: first_and_last(x) for x in inputs)):
        assert torch.equal(first, last)


def test_a_thread_without_a_value_gets_the_latest_of_any():
    latest = Latest()
    assert latest.get() is None
    latest.set(1)
    assert together(latest.get) == [1]  # as where backward repeats the last layer alone

    def other():
        latest.set(2)
        return latest.get()

    assert together(other) == [2] and latest.get() == 1


@pytest.mark.parametrize("way", ["copy", "pickle", "torch.save"])
def test_copies_after_a_pass(way):
    model, data = ready(), tiny.batch()
    expected = logits(model)
    if way == "copy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    first = layers(other)[0].slim_clusters["default"]
    assert first.last_distance(data["input_ids"].numel()) is None
    assert torch.equal(logits(other), expected)


# --- What a call sets for its own pass -----------------------------------------------------------


def while_another_waits(model, call, other):
    """Run ``call`` in a thread, and ``other`` in this one while it is in the first layer."""
    inside, on = Event(), Event()

    def wait(*_):
        inside.set()
        assert on.wait(SECONDS)

    with ThreadPoolExecutor(1) as pool:
        hook = layers(model)[0].base_layer.register_forward_pre_hook(wait)
        task = pool.submit(call)
        try:
            assert inside.wait(SECONDS)
            hook.remove()
            found = other()
        finally:
            on.set()
        return task.result(SECONDS), found


@pytest.fixture(scope="module")
def two_adapters():
    model = ready(modules_to_save=["lm_head"])
    model.add_adapter("second", tiny.config(r=2, seed=5, modules_to_save=["lm_head"]))
    model.set_adapter("second")
    tiny.train(model, 3, start=20)
    torch.nn.init.normal_(model.get_submodule("base_model.model.lm_head").weight, std=0.3)
    model.set_adapter("default")
    return model.eval()


@pytest.mark.parametrize("others", [None, ["default"] * 3], ids=str)
def test_rows_with_adapters_of_their_own_beside_another_call(two_adapters, others):
    model, names = two_adapters, ["second", BASE, "default", "second"]
    data = {key: value for key, value in tiny.batch().items() if key != "labels"}
    rows = 4 if others is None else len(others)
    other_data = {key: value[:rows] for key, value in data.items()}

    @torch.no_grad()
    def mixed():
        return model(**data, adapter_names=names).logits

    @torch.no_grad()
    def other():
        return model(**other_data, **({"adapter_names": others} if others else {})).logits

    expected = mixed(), other()
    for one, alone in zip(while_another_waits(model, mixed, other), expected):
        assert torch.equal(one, alone)


def test_identity_experts_of_one_sequence_beside_another_call():
    model = ready()
    one, other = tiny.batch(2, 9, padding=None)["input_ids"]
    expected = identity_by_token(model, one)
    assert not torch.allclose(identity_by_token(model, other), expected)

    def generate():
        return logits(model, {"input_ids": other[None], "attention_mask": None})

    found, _ = while_another_waits(model, lambda: identity_by_token(model, one), generate)
    torch.testing.assert_close(found, expected)


def test_each_call_is_recorded_with_its_own_mask():
    model = ready()
    calls = [tiny.batch(padding=side) for side in ("right", None)]
    with observe(model) as seen:
        while_another_waits(model, *(lambda one=one: logits(model, one) for one in calls))
    n_tokens = sum(int(one["attention_mask"].sum()) for one in calls)
    assert {row["n_tokens"] for row in seen.rows()} == {n_tokens}
