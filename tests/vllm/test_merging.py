"""Methods that merge tokens hand the same features to the language model in vLLM."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoProcessor

from tests.vllm import tiny
from tests.vllm.tiny import answer, attached, chat, engine, picture, request, settings

SAVED = {
    # Newlines stay as they are. vLLM counts positions anew.
    "LlavaNextForConditionalGeneration": (tiny.save_llava_next, {"positions": "compact"}),
    "Qwen2_5_VLForConditionalGeneration": (partial(tiny.save_qwen, kind="qwen2_5_vl"), {}),
}
MERGING = "adav+:merge=1.0+alike=0.0+reach=1000"


@pytest.mark.parametrize("architecture", SAVED)
def test_same_answers(tmp_path, architecture):
    save, options = SAVED[architecture]
    folder = save(tmp_path)
    one = request(
        chat(AutoProcessor.from_pretrained(folder), "what is on the left ?"), picture(0, 48, 32)
    )
    merged = {"keep": 3, "method": MERGING}
    plain = {"keep": 3, "method": MERGING.replace("merge=1.0", "merge=0.0")}
    _, answers = attached(folder, [one], **merged, **options)
    assert answers != attached(folder, [one], **plain, **options)[1]
    with engine(folder, settings(architecture, **merged), max_num_batched_tokens=64) as llm:
        assert answer(llm, [one]) == answers


def test_deepstack_features_are_not_merged(tmp_path):
    """Answers are not compared: stock vLLM's differ from transformers' on this model."""
    folder = tiny.save_qwen(tmp_path, "qwen3_vl")
    one = request(chat(AutoProcessor.from_pretrained(folder), "how many red ?"), picture(0, 48, 32))
    overrides = settings("Qwen3VLForConditionalGeneration", keep=3, method=MERGING)
    with engine(folder, overrides, max_num_batched_tokens=64) as llm:
        model, seen = tiny.model_of(llm), []
        choose, marked = model.choose, model.marked
        model.choose = lambda *args: seen.append((args[0], choose(*args))) or seen[-1][1]
        model.marked = lambda left, *args: seen.append(left) or marked(left, *args)
        answer(llm, [one])
    (features, selection), left = seen
    d_model = selection.features.shape[1]
    assert torch.equal(left[:, :d_model], selection.features)
    assert torch.equal(left[:, d_model:], features[selection.indices, d_model:])
    assert not torch.allclose(selection.features, features[selection.indices, :d_model])
    assert left.shape[1] > d_model
