from __future__ import annotations

import pytest
import torch
from PIL import Image

from budwood.prune import attach
from budwood.prune.chat import prepare
from budwood.prune.latency import FirstToken, generate_timed
from budwood.timing import side_by_side
from tests import tiny_vlm


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tiny_vlm.save_llava(tmp_path_factory.mktemp("llava"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model, prepare(
        AutoProcessor.from_pretrained(folder), [Image.new("RGB", (9, 9))], ["What"]
    )


def test_timed_generate_is_generate(vlm):
    model, inputs = vlm
    before = set(vars(model)), set(vars(model.base_model))
    timed = generate_timed(model, inputs, max_new_tokens=5)
    assert torch.equal(timed.sequences, model.generate(**inputs, do_sample=False, max_new_tokens=5))
    assert len(timed.step_ms) == 4 and min(timed.step_ms) > 0
    assert 0 < timed.first.encode_ms < timed.first.total_ms and timed.first.select_ms == 0
    assert (set(vars(model)), set(vars(model.base_model))) == before


def test_timed_with_a_session(vlm):
    model, inputs = vlm
    with attach(model, keep=3) as session:
        timed = generate_timed(model, inputs, session, max_new_tokens=2)
    assert timed.first.select_ms == session.timing.select_ms > 0
    assert timed.first.encode_ms == session.timing.encode_ms
    assert len(timed.step_ms) == 1


def test_encoder_is_as_before_after_an_exception(vlm):
    model, inputs = vlm
    with pytest.raises(ValueError):
        generate_timed(model, inputs, max_new_tokens=-1)
    assert "get_image_features" not in vars(model.base_model)


def test_side_by_side_takes_turns():
    order = []
    runs = {name: lambda i, name=name: order.append((name, i)) or len(order) for name in "abc"}
    found = side_by_side(runs, 3)
    assert order[:3] == [("a", 0), ("b", 0), ("c", 0)]  # warm-up
    assert [name for name, _ in order[3:]] == list("abcbcacab")
    assert found["b"] == [5, 7, 12]


def test_median_of_each_part():
    times = [FirstToken(10, 1, 5), FirstToken(30, 3, 4), FirstToken(20, 2, 6)]
    median = FirstToken.median(times)
    assert (median.total_ms, median.encode_ms, median.select_ms) == (20, 2, 5)
    assert median.prefill_ms == 13
